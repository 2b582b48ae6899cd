/* List scheduling as in list_scheduling.py, which says what it is. */

#include "pipeline.h"

#include <stdlib.h>

typedef struct {
    const double *target; /* of each node */
    double patience;      /* a rank waits for an action of an earlier target, up to this share of the one it could start */
    int in_order;         /* forwards of a rank strictly by target; else each stage's as they come */
    double thrift_s;      /* a weight gradient only where its rank would otherwise have been idle for this much longer
                             than any other rank; negative: by target */
} Rule;

typedef struct {
    int num_stages, m;
    int *next; /* [kind * S + stage]: microbatches started */
    double *arrival, *used, *wake, *free_s;
    double *idle; /* since its first action */
    int *own, *own_offset, *filled; /* stages of each rank; nodes in its row */
} State;

static double stage_bytes(const Pipeline *p, const State *s, int stage) { return p->change[stage * s->m]; }

/* Bytes that must be free for the stage's next forward: its own, and what the oldest microbatch on the rank, that is not
   through all of the rank's forwards, still needs. */
static double claim(const Pipeline *p, const State *s, int rank, int stage)
{
    int oldest = s->next[stage] + 1;
    double bytes = stage_bytes(p, s, stage);
    for (int k = s->own_offset[rank]; k < s->own_offset[rank + 1]; k++)
        if (s->own[k] != stage && s->next[s->own[k]] < oldest)
            oldest = s->next[s->own[k]];
    if (oldest <= s->next[stage])
        for (int k = s->own_offset[rank]; k < s->own_offset[rank + 1]; k++)
            if (s->own[k] != stage && s->next[s->own[k]] == oldest)
                bytes += stage_bytes(p, s, s->own[k]);
    return bytes;
}

/* The stage whose next forward is due first, -1 where all have run. */
static int first_due(const State *s, const Rule *rule, int rank)
{
    int due = -1;
    double least = NEVER;
    for (int k = s->own_offset[rank]; k < s->own_offset[rank + 1]; k++) {
        int stage = s->own[k], i = s->next[stage];
        if (i < s->m && rule->target[stage * s->m + i] < least) {
            least = rule->target[stage * s->m + i];
            due = stage;
        }
    }
    return due;
}

/* Does a rank rather wait until `soon` than run this weight gradient? */
static int worth_waiting(const Pipeline *p, const State *s, const Rule *rule, int rank, int pending, double soon)
{
    double most = 0.0;
    for (int r = 0; r < p->num_ranks; r++)
        most = s->idle[r] > most ? s->idle[r] : most;
    return soon < s->free_s[rank] + p->seconds[pending] - SLACK_S &&
           s->idle[rank] + soon - s->free_s[rank] <= most + rule->thrift_s + SLACK_S;
}

/* The node that the rank starts now; -1 where it waits, until `wake`. */
static int choose(const Pipeline *p, State *s, const Rule *rule, int rank, double now)
{
    int best = -1, m = s->m, num_stages = s->num_stages;
    int due = rule->in_order ? first_due(s, rule, rank) : -1;
    double best_target = NEVER, soon = NEVER, soon_target = NEVER;
    int pending = -1, short_of_memory = 0;
    for (int k = s->own_offset[rank]; k < s->own_offset[rank + 1]; k++)
        for (int kind = 2; kind >= 0; kind--) {
            int stage = s->own[k], i = s->next[kind * num_stages + stage], node = (kind * num_stages + stage) * m + i;
            if (i >= m || s->arrival[node] >= NEVER)
                continue;
            if (kind == 2 && rule->thrift_s >= 0.0) {
                pending = pending < 0 || rule->target[node] < rule->target[pending] ? node : pending;
                continue;
            }
            if (s->arrival[node] <= now + SLACK_S ? rule->target[node] >= best_target : s->arrival[node] >= soon)
                continue;
            if (kind == 0) {
                double bytes = rule->in_order ? stage_bytes(p, s, stage) : claim(p, s, rank, stage);
                if (rule->in_order && stage != due)
                    continue;
                if (s->used[rank] + bytes > p->limit[rank]) {
                    short_of_memory |= s->arrival[node] <= now + SLACK_S;
                    continue;
                }
            }
            if (s->arrival[node] <= now + SLACK_S) {
                best = node;
                best_target = rule->target[node];
            } else {
                soon = s->arrival[node];
                soon_target = rule->target[node];
            }
        }
    if (pending >= 0 && best < 0 && (short_of_memory || !worth_waiting(p, s, rule, rank, pending, soon)))
        return pending;
    if (best >= 0 && !(soon_target < best_target && soon < now + rule->patience * p->seconds[best]))
        return best;
    s->wake[rank] = soon;
    return -1;
}

static void start(const Pipeline *p, State *s, int rank, int node, double now)
{
    double end = now + p->seconds[node];
    if (s->filled[rank] > 0)
        s->idle[rank] += now - s->free_s[rank];
    s->next[node / s->m]++;
    s->used[rank] += p->change[node];
    s->free_s[rank] = s->wake[rank] = end;
    p->row[p->offset[rank] + s->filled[rank]++] = node;
    for (int j = 2 * node; j < 2 * node + 2; j++) {
        int next = p->after[j];
        if (next < 0)
            continue;
        int other = p->rank[next];
        double at = end + p->lag[next];
        s->arrival[next] = at;
        at = at > s->free_s[other] ? at : s->free_s[other];
        if (other != rank && at < s->wake[other])
            s->wake[other] = at;
    }
}

static double run(const Pipeline *p, State *s, const Rule *rule, double give_up_s)
{
    double makespan = 0.0;
    for (int node = 0; node < p->num_nodes; node++)
        s->arrival[node] = p->before[node] < 0 ? 0.0 : NEVER;
    for (int r = 0, k = 0; r < p->num_ranks; r++) {
        s->own_offset[r] = k;
        for (int stage = 0; stage < s->num_stages; stage++)
            if (p->rank[stage * s->m] == r)
                s->own[k++] = stage;
        s->own_offset[r + 1] = k;
    }
    for (int left = p->num_nodes; left;) {
        int rank = 0, node;
        for (int r = 1; r < p->num_ranks; r++)
            rank = s->wake[r] < s->wake[rank] ? r : rank;
        double now = s->wake[rank];
        if (now >= give_up_s)
            return NEVER; /* also where all ranks wait for memory */
        node = choose(p, s, rule, rank, now);
        if (node >= 0) {
            start(p, s, rank, node, now);
            left--;
            makespan = s->free_s[rank] > makespan ? s->free_s[rank] : makespan;
        }
    }
    return makespan;
}

/* Writes orders into row; their makespan, NEVER where memory leaves no way on or where it would exceed give_up_s;
   negative where there is no memory. */
double list_schedule(const Pipeline *p, const double *target, double patience, int in_order, double thrift_s, double give_up_s)
{
    int num_stages = p->num_nodes / (3 * p->num_microbatches);
    size_t ranks = (size_t)p->num_ranks, stages = (size_t)num_stages;
    int *ints = calloc(4 * stages + 2 * ranks + 1, sizeof(int));
    double *doubles = calloc((size_t)p->num_nodes + 4 * ranks, sizeof(double)), makespan = -1.0;
    if (ints && doubles) {
        Rule rule = {target, patience, in_order, thrift_s};
        State s = {.num_stages = num_stages, .m = p->num_microbatches, .next = ints, .own = ints + 3 * stages,
                   .own_offset = ints + 4 * stages, .filled = ints + 4 * stages + ranks + 1,
                   .used = doubles, .wake = doubles + ranks, .free_s = doubles + 2 * ranks,
                   .idle = doubles + 3 * ranks, .arrival = doubles + 4 * ranks};
        makespan = run(p, &s, &rule, give_up_s < NEVER ? give_up_s : NEVER);
    }
    free(ints);
    free(doubles);
    return makespan;
}
