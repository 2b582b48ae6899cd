/* When an order's actions end, found anew for all or after a change, and the longest paths that the ends lead to. For
   annealing.c.

   Heads (ends) and tails (longest path from a node's start to the end of everything) are kept. */

#include "pipeline.h"

#include <stdint.h>

#define MAX_TIMES 6 /* that a node's end is found anew after one move: one that closes a cycle has none */

typedef struct {
    double key;
    int node;
} Entry;

typedef struct {
    int *position, *visited, *waiter, *pairs, *kept, *best, *stack, *begin;
    unsigned *done, *waits, stamp;
    double *end, *trial, *tail, *held, *clock;
    Entry *queue;
    unsigned char *queued, *times; /* is the node in the queue; how often it has been through it */
    int num_visited, num_queued;
    uint64_t random;
} State;

/* A queue of nodes, least key first; each node once. */
static void push(State *s, int node, double key)
{
    int i = s->num_queued;
    if (s->queued[node])
        return;
    s->queued[node] = 1;
    s->num_queued++;
    for (; i > 0 && key < s->queue[(i - 1) / 2].key; i = (i - 1) / 2)
        s->queue[i] = s->queue[(i - 1) / 2];
    s->queue[i].key = key;
    s->queue[i].node = node;
}

static int pop(State *s)
{
    int node = s->queue[0].node, n = --s->num_queued, i = 0;
    Entry last = s->queue[n];
    for (;;) {
        int child = 2 * i + 1;
        if (child + 1 < n && s->queue[child + 1].key < s->queue[child].key)
            child++;
        if (child >= n || s->queue[child].key >= last.key)
            break;
        s->queue[i] = s->queue[child];
        i = child;
    }
    s->queue[i] = last;
    s->queued[node] = 0;
    return node;
}

/* Ends of all nodes. The makespan, or NEVER where the orders cannot finish. */
static double evaluate(const Pipeline *p, State *s)
{
    int depth = 0, found = 0;
    double makespan = 0.0;
    s->stamp++;
    for (int r = 0; r < p->num_ranks; r++) {
        s->begin[r] = p->offset[r];
        s->clock[r] = 0.0;
        s->stack[depth++] = r;
    }
    while (depth) {
        int r = s->stack[--depth], i = s->begin[r], stop = p->offset[r + 1];
        double clock = s->clock[r];
        for (; i < stop; i++) {
            int node = p->row[i], source = p->before[node];
            for (const int *own = p->own + 2 * node; own < p->own + 2 * node + 2; own++)
                if (*own >= 0 && s->done[*own] != s->stamp)
                    return NEVER;
            if (source >= 0) {
                if (s->done[source] != s->stamp) {
                    int slot = 2 * source + (p->after[2 * source] != node);
                    s->waiter[slot] = r;
                    s->waits[slot] = s->stamp;
                    break;
                }
                double arrival = s->trial[source] + p->lag[node];
                clock = arrival > clock ? arrival : clock;
            }
            clock += p->seconds[node];
            s->trial[node] = clock;
            s->done[node] = s->stamp;
            s->visited[found++] = node;
            for (int slot = 2 * node; slot < 2 * node + 2; slot++)
                if (s->waits[slot] == s->stamp)
                    s->stack[depth++] = s->waiter[slot];
        }
        s->begin[r] = i;
        s->clock[r] = clock;
        makespan = clock > makespan ? clock : makespan;
    }
    s->num_visited = found;
    return found < p->offset[p->num_ranks] ? NEVER : makespan;
}

static inline double end_of(const State *s, int node) { return s->done[node] == s->stamp ? s->trial[node] : s->end[node]; }

static inline double start_of(const Pipeline *p, const State *s, int node)
{
    int i = s->position[node], source = p->before[node];
    double start = i > p->offset[p->rank[node]] ? end_of(s, p->row[i - 1]) : 0.0;
    double arrival = source >= 0 ? end_of(s, source) + p->lag[node] : 0.0;
    return arrival > start ? arrival : start;
}

/* The same after a change of the row from first to last: ends that differ, and those of the changed positions, go to
   `trial`. NEVER also where the makespan is bound to exceed at_most, or where ends do not come to rest soon. Tails are valid for
   nodes that started at tails_from_s or later. */
static double evaluate_change(const Pipeline *p, State *s, int first, int last, double at_most, double tails_from_s)
{
    double makespan = 0.0;
    s->stamp++;
    s->num_visited = 0;
    for (int i = first; i <= last; i++) {
        int node = p->row[i];
        s->trial[node] = start_of(p, s, node) + p->seconds[node];
        s->done[node] = s->stamp;
        s->times[node] = 0;
        s->visited[s->num_visited++] = node;
        for (int j = 2 * node; j < 2 * node + 2; j++)
            if (p->after[j] >= 0)
                push(s, p->after[j], start_of(p, s, p->after[j]));
    }
    if (last + 1 < p->offset[p->rank[p->row[last]] + 1])
        push(s, p->row[last + 1], start_of(p, s, p->row[last + 1]));
    while (s->num_queued) {
        int node = pop(s), i = s->position[node];
        double start = start_of(p, s, node), end = start + p->seconds[node], before = end_of(s, node);
        if (s->done[node] != s->stamp) {
            s->done[node] = s->stamp;
            s->times[node] = 0;
            s->visited[s->num_visited++] = node;
        }
        s->trial[node] = end;
        if ((start + s->tail[node] > at_most && s->end[node] - p->seconds[node] >= tails_from_s) ||
            ++s->times[node] > MAX_TIMES) {
            while (s->num_queued)
                s->queued[s->queue[--s->num_queued].node] = 0;
            return NEVER;
        }
        if (end == before)
            continue;
        if (i + 1 < p->offset[p->rank[node] + 1])
            push(s, p->row[i + 1], start_of(p, s, p->row[i + 1]));
        for (int j = 2 * node; j < 2 * node + 2; j++)
            if (p->after[j] >= 0)
                push(s, p->after[j], start_of(p, s, p->after[j]));
    }
    for (int r = 0; r < p->num_ranks; r++)
        if (p->offset[r] < p->offset[r + 1]) {
            double end = end_of(s, p->row[p->offset[r + 1] - 1]);
            makespan = end > makespan ? end : makespan;
        }
    return makespan;
}

/* Takes over the evaluated ends; tails, where those of the nodes at positions from first to last may have changed. */
static void keep_trial(const Pipeline *p, State *s, int first, int last)
{
    for (int k = 0; k < s->num_visited; k++)
        s->end[s->visited[k]] = s->trial[s->visited[k]];
    for (int i = first; i <= last; i++)
        push(s, p->row[i], -s->end[p->row[i]]);
    while (s->num_queued) {
        int node = pop(s), i = s->position[node], r = p->rank[node];
        double tail = i + 1 < p->offset[r + 1] ? s->tail[p->row[i + 1]] : 0.0;
        for (int j = 2 * node; j < 2 * node + 2; j++) {
            int next = p->after[j];
            if (next >= 0 && p->lag[next] + s->tail[next] > tail)
                tail = p->lag[next] + s->tail[next];
        }
        tail += p->seconds[node];
        if (tail == s->tail[node])
            continue;
        s->tail[node] = tail;
        if (i > p->offset[r])
            push(s, p->row[i - 1], -s->end[p->row[i - 1]]);
        if (p->before[node] >= 0)
            push(s, p->before[node], -s->end[p->before[node]]);
    }
}

/* The longest path through the moved nodes, were everything else that they wait for to stay where it is. */
static double estimate(const Pipeline *p, State *s, int r, int first, int last)
{
    double clock = first > p->offset[r] ? s->end[p->row[first - 1]] : 0.0, longest = 0.0;
    for (int i = first; i <= last; i++) {
        int node = p->row[i], source = p->before[node];
        if (source >= 0) {
            int moved = p->rank[source] == r && s->position[source] >= first && s->position[source] <= last;
            double arrival = (moved ? s->trial[source] : s->end[source]) + p->lag[node];
            if (moved && s->position[source] > i)
                return NEVER;
            clock = arrival > clock ? arrival : clock;
        }
        clock += p->seconds[node];
        s->trial[node] = clock;
        for (int j = 2 * node; j < 2 * node + 2; j++) {
            int next = p->after[j];
            if (next >= 0 && !(p->rank[next] == r && s->position[next] >= first && s->position[next] <= last)) {
                double path = clock + p->lag[next] + s->tail[next];
                longest = path > longest ? path : longest;
            }
        }
    }
    if (last + 1 < p->offset[r + 1])
        clock += s->tail[p->row[last + 1]];
    return clock > longest ? clock : longest;
}
