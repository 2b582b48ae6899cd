"""Why this plan? Explanations, differences between plans, the predicted timeline."""
