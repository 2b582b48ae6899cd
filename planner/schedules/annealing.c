/* Simulated annealing on the order of a pipeline's actions. local_search.py says what is searched and calls it.

   Heads (ends) and tails (longest path from a node's start to the end of everything) are kept, so that most moves are
   refused by the longest path through the few actions that they move, and only promising ones are evaluated, from the
   first moved action on. */

#include "pipeline.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MAX_STEP 24     /* places that an action is moved by, at most */
#define CLOCK_EVERY 128 /* moves between looks at the clock */
#define PATH_EVERY 32   /* moves tried on one critical path */
#define MAX_TIMES 6     /* that a node's end is found anew after one move: one that closes a cycle has none */

typedef struct {
    double hottest_s, coldest_s, bound_s, time_limit_s;
    double repeated; /* share of evaluated moves that are made for all microbatches alike */
    uint64_t seed;
} Settings;

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

static double uniform(State *s)
{
    s->random ^= s->random << 13;
    s->random ^= s->random >> 7;
    s->random ^= s->random << 17;
    return (double)(s->random >> 11) / 9007199254740992.0;
}

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

/* Must `one` come earlier than `node`, of the same rank? */
static inline int is_own(const Pipeline *p, int one, int node) { return p->own[2 * node] == one || p->own[2 * node + 1] == one; }

/* Collects the positions i where row[i] and row[i + 1] follow each other on a critical path for no other reason than
   their order. */
static int critical_pairs(const Pipeline *p, State *s)
{
    int count = 0, node = -1;
    for (int r = 0; r < p->num_ranks; r++) {
        int last = p->offset[r + 1] - 1;
        if (last >= p->offset[r] && (node < 0 || s->end[p->row[last]] > s->end[node]))
            node = p->row[last];
    }
    for (;;) {
        double start = s->end[node] - p->seconds[node];
        int i = s->position[node], source = p->before[node];
        int previous = i > p->offset[p->rank[node]] ? p->row[i - 1] : -1;
        int by_rank = previous >= 0 && s->end[previous] >= start - SLACK_S;
        int by_data = source >= 0 && s->end[source] + p->lag[node] >= start - SLACK_S;
        if (start <= SLACK_S || !(by_rank || by_data))
            return count;
        const int *frozen = p->frozen + 2 * p->rank[node];
        if (by_rank && previous != source && !is_own(p, previous, node) && (i < frozen[0] || i > frozen[1]))
            s->pairs[count++] = i - 1;
        node = by_data && (!by_rank || uniform(s) < 0.5) ? source : previous;
    }
}

/* Index of a pair that is still critical; those that no longer are go. -1: none is left. */
static int draw_pair(const Pipeline *p, State *s, int *num_pairs, double makespan)
{
    while (*num_pairs) {
        int k = (int)(uniform(s) * *num_pairs), i = s->pairs[k], node = p->row[i], next = p->row[i + 1];
        if (s->end[node] + s->tail[next] >= makespan - SLACK_S && p->before[next] != node &&
            !is_own(p, node, next))
            return k;
        s->pairs[k] = s->pairs[--*num_pairs];
    }
    return -1;
}

static void move(int *row, int from, int to)
{
    int node = row[from];
    if (from < to)
        memmove(row + from, row + from + 1, sizeof(int) * (size_t)(to - from));
    else
        memmove(row + to + 1, row + to, sizeof(int) * (size_t)(from - to));
    row[to] = node;
}

/* Moves row[i] some places on or row[i + 1] some places back; first and last are the ends of what changed. */
static void move_one(const Pipeline *p, State *s, int i, int low, int high, int *first, int *last)
{
    int step = 1, back = uniform(s) < 0.5;
    while (step < MAX_STEP && uniform(s) < 0.5)
        step++;
    *first = back ? i + 1 - step : i;
    *last = back ? i + 1 : i + step;
    *first = *first < low ? low : *first;
    *last = *last >= high ? high - 1 : *last;
    memcpy(s->kept + *first, p->row + *first, sizeof(int) * (size_t)(*last - *first + 1));
    move(p->row, back ? *last : *first, back ? *first : *last);
}

/* Swaps row[i] and row[i + 1], and with them all neighbours of the same two actions, as many microbatches apart. */
static void move_repeated(const Pipeline *p, State *s, int i, int low, int high, int *first, int *last)
{
    int m = p->num_microbatches, *row = p->row;
    int one = row[i] / m, other = row[i + 1] / m, apart = row[i + 1] % m - row[i] % m;
    *first = high;
    memcpy(s->kept + low, row + low, sizeof(int) * (size_t)(high - low));
    for (int j = low; j + 1 < high; j++)
        if (row[j] / m == one && row[j + 1] / m == other && row[j + 1] % m - row[j] % m == apart) {
            move(row, j, j + 1);
            *first = j < *first ? j : *first;
            *last = ++j;
        }
}

/* In memory, and nothing before what must come earlier. */
static int fits(const Pipeline *p, const State *s, int r, int first, int last)
{
    double held = first > p->offset[r] ? s->held[first - 1] : 0.0;
    for (int i = first; i <= last; i++) {
        int node = p->row[i];
        held += p->change[node];
        if (held > p->limit[r])
            return 0;
        for (const int *own = p->own + 2 * node; own < p->own + 2 * node + 2; own++)
            if (*own >= 0 && s->position[*own] > i)
                return 0;
    }
    return 1;
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

static void place(const Pipeline *p, State *s, int first, int last)
{
    for (int i = first; i <= last; i++)
        s->position[p->row[i]] = i;
}

static double search(const Pipeline *p, State *s, const Settings *settings)
{
    int num_placed = p->offset[p->num_ranks];
    size_t bytes = sizeof(int) * (size_t)num_placed;
    double current, least, temperature_s = settings->hottest_s, began_s = now_s();
    int num_pairs = 0;
    long num_evaluated = 0, num_repeated = 0;
    for (int r = 0; r < p->num_ranks; r++) {
        double held = 0.0;
        for (int i = p->offset[r]; i < p->offset[r + 1]; i++)
            s->held[i] = held += p->change[p->row[i]];
    }
    place(p, s, 0, num_placed - 1);
    current = least = evaluate(p, s);
    if (current >= NEVER || settings->time_limit_s <= 0.0)
        return current;
    keep_trial(p, s, 0, num_placed - 1);
    memcpy(s->best, p->row, bytes);
    for (long tried = 0; least > settings->bound_s * (1 + 1e-9); tried++) {
        if (tried % CLOCK_EVERY == 0) {
            double share = (now_s() - began_s) / settings->time_limit_s;
            if (share >= 1.0)
                break;
            temperature_s = settings->hottest_s * pow(settings->coldest_s / settings->hottest_s, share);
        }
        int pair = num_pairs && tried % PATH_EVERY ? draw_pair(p, s, &num_pairs, current) : -1;
        if (pair < 0) {
            num_pairs = critical_pairs(p, s);
            if (num_pairs == 0)
                break;
            pair = (int)(uniform(s) * num_pairs);
        }
        int i = s->pairs[pair], r = p->rank[p->row[i]];
        int begin = p->offset[r], first, last = i;
        const int *frozen = p->frozen + 2 * r;
        int low = i < frozen[0] ? begin : frozen[1], high = i < frozen[0] ? frozen[0] : p->offset[r + 1];
        int repeated = num_repeated < settings->repeated * num_evaluated;
        double at_most = current - temperature_s * log(1.0 - uniform(s)), makespan = NEVER;
        (repeated ? move_repeated : move_one)(p, s, i, low, high, &first, &last);
        place(p, s, first, last);
        if (fits(p, s, r, first, last) && (repeated || estimate(p, s, r, first, last) <= at_most)) {
            num_evaluated++;
            num_repeated += repeated;
            double window_end_s = s->end[s->kept[last]];
            makespan = repeated ? evaluate(p, s)
                                : evaluate_change(p, s, first, last, at_most, window_end_s - SLACK_S);
            makespan = makespan > at_most ? NEVER : makespan;
        }
        if (makespan < NEVER) {
            double held = first > begin ? s->held[first - 1] : 0.0;
            for (int j = first; j <= last; j++)
                s->held[j] = held += p->change[p->row[j]];
            current = makespan;
            keep_trial(p, s, first > begin ? first - 1 : first, last);
            if (makespan < least * (1 - 1e-12)) {
                least = makespan;
                memcpy(s->best, p->row, bytes);
            }
        } else {
            memcpy(p->row + first, s->kept + first, sizeof(int) * (size_t)(last - first + 1));
            place(p, s, first, last);
        }
    }
    memcpy(p->row, s->best, bytes);
    return least;
}

/* Leaves the best order in row and returns its makespan, NEVER where the given one cannot finish; negative where there
   is no memory. */
double anneal(const Pipeline *p, const Settings *settings)
{
    size_t n = (size_t)p->num_nodes, ranks = (size_t)p->num_ranks;
    int *ints = calloc(9 * n + 2 * ranks, sizeof(int));
    unsigned *stamps = calloc(3 * n, sizeof(unsigned));
    double *doubles = calloc(4 * n + ranks, sizeof(double)), makespan = -1.0;
    unsigned char *bytes = calloc(2 * n, 1);
    Entry *queue = calloc(n, sizeof(Entry));
    if (ints && stamps && doubles && bytes && queue) {
        State s = {.position = ints, .visited = ints + n, .waiter = ints + 2 * n,
                   .pairs = ints + 4 * n, .kept = ints + 5 * n, .best = ints + 6 * n, .begin = ints + 7 * n,
                   .stack = ints + 7 * n + ranks, /* each node is waited for twice: 2 n + ranks at most */
                   .done = stamps, .queued = bytes, .times = bytes + n,
                   .queue = queue, .waits = stamps + n,
                   .end = doubles, .trial = doubles + n, .tail = doubles + 2 * n, .held = doubles + 3 * n,
                   .clock = doubles + 4 * n, .random = settings->seed * 0x9E3779B97F4A7C15u + 1};
        makespan = search(p, &s, settings);
    }
    free(ints);
    free(stamps);
    free(doubles);
    free(bytes);
    free(queue);
    return makespan;
}
