/* A pipeline's actions as numbered nodes: graph.py.

   `row` holds the orders of all ranks one after the other, rank r's from offset[r] to offset[r + 1]. A node starts when
   its predecessor in the row has ended and, `lag` later than its end, the node `before` it; up to two nodes are `after`
   it. `own` are up to two nodes of the same rank that must come earlier. Node (kind * S + stage) * m + microbatch; not every
   number is in the row. */

#define _POSIX_C_SOURCE 199309L
#include <time.h>

#define NEVER 1e300
#define SLACK_S 1e-9

typedef struct {
    int num_nodes, num_ranks, num_microbatches;
    const double *seconds, *lag, *change; /* change: of the rank's memory when the node starts */
    const double *limit;                  /* of each rank's memory */
    const int *rank, *before;             /* -1 where there is none */
    const int *own, *after;               /* two for each node, -1 where there is none */
    const int *offset, *frozen;           /* frozen: two for each rank, from and to which place its row stays as it is */
    int *row;
} Pipeline;

static inline double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
