/* Justification: actions move into earlier gaps of their rank, then, from the end back, into later ones, in turn, until
   nothing more is gained. Of orders without `own`. graph.py calls it. */

#include "pipeline.h"

#include <stdlib.h>
#include <string.h>

#define MAX_ROUNDS 8
#define MAX_REACH 100 /* places that an action is moved by, at most */

typedef struct {
    int back;             /* time runs from the end */
    int *row;             /* in this direction's order */
    double *end, *held;   /* held: on the rank, after each place of the row */
    int *waiter, *stack, *begin;
    double *clock;
    unsigned char *done, *waited;
    double until_s; /* gives up then */
} State;

/* When everything that a node waits for has arrived; -1 and `missing` where something has not ended yet. */
static double arrival(const Pipeline *p, const State *s, int node, int *missing)
{
    double at = 0.0;
    for (int k = 0; k < (s->back ? 2 : 1); k++) {
        int source = s->back ? p->after[2 * node + k] : p->before[node];
        if (source < 0)
            continue;
        if (!s->done[source]) {
            *missing = source;
            return -1.0;
        }
        double ready = s->end[source] + p->lag[s->back ? source : node];
        at = ready > at ? ready : at;
    }
    return at;
}

static double evaluate(const Pipeline *p, State *s)
{
    int depth = 0, left = p->num_nodes, missing = 0;
    double makespan = 0.0;
    memset(s->done, 0, (size_t)p->num_nodes);
    memset(s->waited, 0, (size_t)p->num_nodes);
    for (int r = 0; r < p->num_ranks; r++) {
        s->begin[r] = p->offset[r];
        s->clock[r] = 0.0;
        s->stack[depth++] = r;
    }
    while (depth) {
        int r = s->stack[--depth], i = s->begin[r];
        double clock = s->clock[r];
        for (; i < p->offset[r + 1]; i++) {
            int node = s->row[i];
            double at = arrival(p, s, node, &missing);
            if (at < 0.0) {
                s->waiter[missing] = r;
                s->waited[missing] = 1;
                break;
            }
            clock = (at > clock ? at : clock) + p->seconds[node];
            s->end[node] = clock;
            s->done[node] = 1;
            left--;
            if (s->waited[node])
                s->stack[depth++] = s->waiter[node];
        }
        s->begin[r] = i;
        s->clock[r] = clock;
        makespan = clock > makespan ? clock : makespan;
    }
    return left ? NEVER : makespan;
}

/* The first place from i on whose action fits between `from_s` and `until_s`, and into memory; -1 where there is none. */
static int filler(const Pipeline *p, const State *s, int r, int i, double from_s, double until_s)
{
    int stop = p->offset[r + 1], missing = 0;
    double most = i > p->offset[r] ? s->held[i - 1] : 0.0;
    stop = stop < i + MAX_REACH ? stop : i + MAX_REACH;
    for (int j = i + 1; j < stop; j++) {
        int node = s->row[j];
        double change = s->back ? -p->change[node] : p->change[node], at;
        most = s->held[j - 1] > most ? s->held[j - 1] : most;
        if (from_s + p->seconds[node] > until_s + SLACK_S || most + change > p->limit[r])
            continue;
        at = arrival(p, s, node, &missing);
        if ((at > from_s ? at : from_s) + p->seconds[node] <= until_s + SLACK_S)
            return j;
    }
    return -1;
}

/* Fills the gaps of one rank. Number of actions moved. */
static int fill(const Pipeline *p, State *s, int r)
{
    int moved = 0, low = p->offset[r], missing = 0;
    double clock = 0.0, held = 0.0;
    for (int i = low; i < p->offset[r + 1]; i++)
        s->held[i] = held += s->back ? -p->change[s->row[i]] : p->change[s->row[i]];
    for (int i = low; i < p->offset[r + 1]; i++) {
        int node = s->row[i];
        double start = s->end[node] - p->seconds[node];
        int j = start > clock + SLACK_S ? filler(p, s, r, i, clock, start) : -1;
        if (j >= 0) {
            double change, at;
            node = s->row[j];
            change = s->back ? -p->change[node] : p->change[node];
            memmove(s->row + i + 1, s->row + i, sizeof(int) * (size_t)(j - i));
            memmove(s->held + i + 1, s->held + i, sizeof(double) * (size_t)(j - i));
            s->row[i] = node;
            s->held[i] = (i > low ? s->held[i - 1] : 0.0) + change;
            for (int k = i + 1; k <= j; k++)
                s->held[k] += change;
            at = arrival(p, s, node, &missing);
            s->end[node] = (at > clock ? at : clock) + p->seconds[node];
            moved++;
        }
        clock = s->end[s->row[i]];
    }
    return moved;
}

static void turn(const Pipeline *p, State *s)
{
    for (int r = 0; r < p->num_ranks; r++)
        for (int i = p->offset[r], j = p->offset[r + 1] - 1; i < j; i++, j--) {
            int node = s->row[i];
            s->row[i] = s->row[j];
            s->row[j] = node;
        }
    s->back = !s->back;
}

static double run(const Pipeline *p, State *s)
{
    double makespan = evaluate(p, s), before;
    if (makespan >= NEVER)
        return makespan;
    for (int round = 0; round < MAX_ROUNDS && now_s() < s->until_s; round++) {
        before = makespan;
        for (int half = 0; half < 2; half++) {
            for (int moved = 1, passes = 0; moved && passes < MAX_ROUNDS; passes++) {
                moved = 0;
                for (int r = 0; r < p->num_ranks && now_s() < s->until_s; r++)
                    moved += fill(p, s, r);
                makespan = evaluate(p, s);
            }
            turn(p, s);
            makespan = evaluate(p, s);
        }
        if (makespan >= before - SLACK_S)
            break;
    }
    return makespan;
}

/* Leaves the justified order in row and returns its makespan, NEVER where the given one cannot finish; negative where
   there is no memory. */
double justify(const Pipeline *p, double time_limit_s)
{
    size_t n = (size_t)p->num_nodes, ranks = (size_t)p->num_ranks;
    int *ints = calloc(2 * n + 2 * ranks, sizeof(int));
    double *doubles = calloc(2 * n + ranks, sizeof(double)), makespan = -1.0;
    unsigned char *bytes = calloc(2 * n, 1);
    if (ints && doubles && bytes) {
        State s = {.row = p->row, .waiter = ints, .stack = ints + n, .begin = ints + 2 * n + ranks,
                   .end = doubles, .held = doubles + n, .clock = doubles + 2 * n, .done = bytes, .waited = bytes + n,
                   .until_s = now_s() + time_limit_s};
        makespan = run(p, &s);
    }
    free(ints);
    free(doubles);
    free(bytes);
    return makespan;
}
