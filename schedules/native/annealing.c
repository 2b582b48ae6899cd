/* Simulated annealing on the order of a pipeline's actions. annealing.py says what is searched and calls it.

   Most moves are refused by the longest path through the few actions that they move, and only promising ones are
   evaluated, from the first moved action on. */

#include "ends.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MAX_STEP 24     /* places that an action is moved by, at most */
#define CLOCK_EVERY 128 /* moves between looks at the clock */
#define PATH_EVERY 32   /* moves tried on one critical path */

typedef struct {
    double hottest_s, coldest_s, bound_s, time_limit_s;
    double repeated; /* share of evaluated moves that are made for all microbatches alike */
    uint64_t seed;
} Settings;

static double uniform(State *s)
{
    s->random ^= s->random << 13;
    s->random ^= s->random >> 7;
    s->random ^= s->random << 17;
    return (double)(s->random >> 11) / 9007199254740992.0;
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
