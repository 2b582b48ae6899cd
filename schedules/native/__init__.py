"""The hot loops of synthesis in C, compiled when first needed."""
