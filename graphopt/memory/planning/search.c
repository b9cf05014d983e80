/* Exact search for offsets: blocks with fixed lifetimes, placed below a capacity.
 *
 * Time is cut into sections, one for every maximal set of blocks that live together, and every
 * section has a floor: the height up to which it is filled or given up. Blocks rest on a floor in
 * some section (a solution can be pushed down until that holds), so the search fills valleys. It
 * takes a section in which no block that could lie on the floor reaches over a lower place, and
 * decides what lies on the floor there: each such block in turn, or nothing, which raises the floor
 * to the next height at which something could lie. These cases exclude each other and leave none
 * out, so an exhausted search proves that the capacity cannot be reached.
 *
 * What is pruned:
 *   - a section whose floor and unplaced blocks exceed the capacity; its floor is first raised to
 *     the lowest offset that any of its blocks can have;
 *   - the second of two alike blocks in a choice;
 *   - states that were exhausted before, by a hash of floors and unplaced blocks (64 bits, in a
 *     slot that other bits of the hash choose).
 * Stretches of time that no unplaced block connects are solved one after the other. The section
 * with fewest cases is taken first; in half of the runs cases count less where sections failed
 * often. Runs end after a number of nodes (Luby's sequence) and begin again with another order of
 * blocks; what was exhausted is remembered.
 *
 * Sections, floors and the order by time follow MiniMalloc (Moffitt, ASPLOS 2023, sections 4
 * and 5); the choice by fewest cases is that of exact cover (Knuth, "Dancing Links"), weights are
 * those of Boussemart et al. (ECAI 2004).
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef int64_t i64;
typedef uint64_t u64;
typedef int32_t i32;

enum { FOUND = 1, INFEASIBLE = 0, UNDECIDED = -1, NO_MEMORY = -2 };
enum { TABLE_BITS = 21, TABLE_WAYS = 4, BASE_NODES = 5000 };
enum { LOWEST, FLOOR, FLUSH, PLACED };

typedef struct {
    i32 kind, index;
    i64 old;
} Change;

typedef struct {
    int blocks, sections, words;
    const i32 *first, *end; /* of a block: its sections are [first, end) */
    const i64 *size;
    i64 capacity;
    const i32 *begun; /* of a section: how many blocks begin before it */
    u64 *live;        /* of a section: bits of the blocks that live in it */

    u64 *unplaced;  /* bits of blocks */
    i64 *lowest;    /* of a block: the largest floor of its sections */
    i64 *offset;    /* of a block that is placed */
    i64 *floor;     /* of a section */
    i64 *waiting;   /* of a section: sum of the sizes of its unplaced blocks */
    i32 *count;     /* of a section: its unplaced blocks */
    i32 *flush;     /* of a section: unplaced blocks whose lowest offset is its floor */
    i32 *crossing;  /* of a section: unplaced blocks that live in it and in the one before */
    u64 *set_hash;  /* of a section: of its unplaced blocks */
    u64 *block_hash;

    Change *trail;
    size_t changes, trail_room;
    i32 *stale; /* sections whose floor is to be computed again */
    int stale_count;
    char *is_stale;
    i32 *pool; /* lists of the nodes on the way from the root */
    size_t pooled, pool_room;

    u64 *table;
    double *weight;   /* of a section: how often it failed */
    double *priority; /* of a block */
    int by_weight, out_of_memory;
    i64 patience; /* nodes between two looks at the clock */
    i64 nodes, limit;
    u64 random;
    double deadline;
    volatile int *stop;
} Search;

static u64 mixed(u64 x)
{
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9ULL;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebULL;
    return x ^ (x >> 31);
}

static u64 random_bits(Search *p)
{
    p->random += 0x9e3779b97f4a7c15ULL;
    return mixed(p->random);
}

static double now(void)
{
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int expired(const Search *p)
{
    return *p->stop || now() > p->deadline;
}

static int lowest_bit(u64 bits)
{
#if defined(__GNUC__)
    return __builtin_ctzll(bits);
#else
    int n = 0;
    while (!(bits >> n & 1))
        n++;
    return n;
#endif
}

/* Return the next unplaced block that lives in a section, from block `from` on; -1 at the end. */
static int next_live(const Search *p, int section, int from)
{
    const u64 *live = p->live + (size_t)section * p->words;
    int word = from >> 6;
    if (word >= p->words)
        return -1;
    u64 bits = p->unplaced[word] & live[word] & (~0ULL << (from & 63));
    while (!bits) {
        if (++word == p->words)
            return -1;
        bits = p->unplaced[word] & live[word];
    }
    return word * 64 + lowest_bit(bits);
}

/* The same for the unplaced blocks that live together with `block`: those of its first section,
 * and, as blocks are sorted by it, those that begin later in its lifetime. */
static int next_beside(const Search *p, int block, int from)
{
    int later = p->begun[p->first[block] + 1], last = p->begun[p->end[block]];
    if (from < later) {
        int found = next_live(p, p->first[block], from);
        if (found >= 0 && found < later)
            return found;
        from = later;
    }
    while (from < last) {
        u64 bits = p->unplaced[from >> 6] & (~0ULL << (from & 63));
        if (bits) {
            int found = (from & ~63) + lowest_bit(bits);
            return found < last ? found : -1;
        }
        from = (from | 63) + 1;
    }
    return -1;
}

static void note(Search *p, int kind, int index, i64 old)
{
    if (p->changes == p->trail_room) {
        Change *more = realloc(p->trail, 2 * p->trail_room * sizeof(Change));
        if (!more) {
            /* The search ends before anything is undone. */
            p->out_of_memory = 1;
            p->changes = 0;
        } else {
            p->trail = more;
            p->trail_room *= 2;
        }
    }
    p->trail[p->changes++] = (Change){kind, index, old};
}

static void set_stale(Search *p, int section)
{
    if (!p->is_stale[section]) {
        p->is_stale[section] = 1;
        p->stale[p->stale_count++] = section;
    }
}

/* Raise the lowest offset of an unplaced block. */
static void lift(Search *p, int block, i64 height)
{
    i64 old = p->lowest[block];
    note(p, LOWEST, block, old);
    p->lowest[block] = height;
    for (int s = p->first[block]; s < p->end[block]; s++)
        if (p->floor[s] == old) {
            note(p, FLUSH, s, p->flush[s]);
            if (--p->flush[s] == 0)
                set_stale(p, s);
        }
}

/* Raise floors to what their unplaced blocks need; return 0 where one cannot fit. */
static int settle(Search *p)
{
    int fits = 1;
    while (p->stale_count) {
        int s = p->stale[--p->stale_count];
        p->is_stale[s] = 0;
        if (!fits || !p->count[s])
            continue;
        i64 least = INT64_MAX;
        int flush = 0;
        for (int j = next_live(p, s, 0); j >= 0; j = next_live(p, s, j + 1)) {
            if (p->lowest[j] < least) {
                least = p->lowest[j];
                flush = 1;
            } else if (p->lowest[j] == least)
                flush++;
        }
        if (least > p->floor[s]) {
            note(p, FLOOR, s, p->floor[s]);
            p->floor[s] = least;
        }
        note(p, FLUSH, s, p->flush[s]);
        p->flush[s] = flush;
        if (least + p->waiting[s] > p->capacity) {
            p->weight[s] += 1;
            fits = 0;
        }
    }
    return fits;
}

/* Count a block of its sections in or out. */
static void count_block(Search *p, int block, int sign)
{
    int first = p->first[block], end = p->end[block];
    for (int s = first; s < end; s++) {
        p->waiting[s] += sign * p->size[block];
        p->count[s] += sign;
        p->crossing[s] += s > first ? sign : 0;
        p->set_hash[s] ^= p->block_hash[block];
    }
    p->unplaced[block >> 6] ^= 1ULL << (block & 63);
}

static int place(Search *p, int block)
{
    i64 top = p->lowest[block] + p->size[block];
    note(p, PLACED, block, 0);
    p->offset[block] = p->lowest[block];
    count_block(p, block, -1);
    for (int s = p->first[block]; s < p->end[block]; s++) {
        note(p, FLOOR, s, p->floor[s]);
        p->floor[s] = top;
        set_stale(p, s);
    }
    for (int i = next_beside(p, block, 0); i >= 0; i = next_beside(p, block, i + 1))
        if (p->lowest[i] < top)
            lift(p, i, top);
    return settle(p);
}

static int raise_floor(Search *p, int section, i64 height)
{
    note(p, FLOOR, section, p->floor[section]);
    p->floor[section] = height;
    set_stale(p, section);
    for (int i = next_live(p, section, 0); i >= 0; i = next_live(p, section, i + 1))
        if (p->lowest[i] < height)
            lift(p, i, height);
    return settle(p);
}

static void undo(Search *p, size_t mark)
{
    while (p->changes > mark) {
        Change change = p->trail[--p->changes];
        switch (change.kind) {
        case LOWEST:
            p->lowest[change.index] = change.old;
            break;
        case FLOOR:
            p->floor[change.index] = change.old;
            break;
        case FLUSH:
            p->flush[change.index] = (i32)change.old;
            break;
        case PLACED:
            count_block(p, change.index, 1);
            break;
        }
    }
}

static u64 state_hash(const Search *p, int lo, int hi)
{
    u64 hash = 0;
    for (int s = lo; s < hi; s++)
        hash += mixed((u64)p->floor[s] * 0x9e3779b97f4a7c15ULL + p->set_hash[s] +
                      (u64)s * 0xda942042e4dd58b5ULL);
    hash = mixed(hash);
    return hash ? hash : 1;
}

static u64 *slots(const Search *p, u64 hash)
{
    u64 place = mixed(hash ^ 0x5851f42d4c957f2dULL) >> (64 - TABLE_BITS);
    return p->table + place * TABLE_WAYS;
}

/* Whether every block that could lie on a section's floor has no lower place below it. */
static int is_valley(const Search *p, int section)
{
    i64 floor = p->floor[section];
    for (int j = next_live(p, section, 0); j >= 0; j = next_live(p, section, j + 1))
        if (p->lowest[j] == floor)
            for (int s = p->first[j]; s < p->end[j]; s++)
                if (p->floor[s] < floor)
                    return 0;
    return 1;
}

/* Return the valley with fewest cases, the lower one of equals. Leaving its floor bare counts as
 * two: what is left bare is lost. */
static int chosen_section(const Search *p, int lo, int hi)
{
    int best = -1;
    double least = 0;
    for (int s = lo; s < hi; s++) {
        if (!p->count[s])
            continue;
        double cases = p->flush[s] + (p->floor[s] + p->waiting[s] < p->capacity ? 2 : 0);
        if (p->by_weight && cases > 1)
            cases /= p->weight[s];
        if (best >= 0 && (cases > least || (cases == least && p->floor[s] >= p->floor[best])))
            continue;
        if (is_valley(p, s)) {
            best = s;
            least = cases;
        }
    }
    return best;
}

/* Return the least offset that some block of a section can have if none lies on its floor. */
static i64 height_without(const Search *p, int section)
{
    i64 floor = p->floor[section], next = INT64_MAX;
    for (int j = next_live(p, section, 0); j >= 0; j = next_live(p, section, j + 1)) {
        if (p->lowest[j] > floor) {
            if (p->lowest[j] < next)
                next = p->lowest[j];
            continue;
        }
        /* It then rests on a block that is still to be placed. */
        for (int i = next_beside(p, j, 0); i >= 0; i = next_beside(p, j, i + 1)) {
            i64 top = p->lowest[i] + p->size[i];
            if (i != j) {
                top = top > floor ? top : floor + 1;
                next = top < next ? top : next;
            }
        }
    }
    return next;
}

static i32 *pooled(Search *p, size_t length)
{
    if (p->pooled + length > p->pool_room) {
        p->out_of_memory = 1;
        return NULL;
    }
    i32 *list = p->pool + p->pooled;
    p->pooled += length;
    return list;
}

static int alike(const Search *p, int a, int b)
{
    return p->first[a] == p->first[b] && p->end[a] == p->end[b] && p->size[a] == p->size[b];
}

static int solve(Search *p, int lo, int hi);

/* Try the cases of one section after the other, those of highest priority first. */
static int branch(Search *p, int lo, int hi)
{
    size_t mark = p->changes;
    u64 hash = state_hash(p, lo, hi), *known = slots(p, hash);
    for (int k = 0; k < TABLE_WAYS; k++)
        if (known[k] == hash)
            return INFEASIBLE;
    for (;;) {
        if (++p->nodes > p->limit || p->out_of_memory)
            return UNDECIDED;
        if (p->nodes % p->patience == 0 && expired(p)) {
            p->limit = 0;
            return UNDECIDED;
        }
        int s = chosen_section(p, lo, hi), cases = 0;
        i64 floor = p->floor[s], spare = p->capacity - floor - p->waiting[s];
        i32 *list = pooled(p, p->flush[s]);
        if (!list)
            return UNDECIDED;
        for (int j = next_live(p, s, 0); j >= 0; j = next_live(p, s, j + 1)) {
            int skip = p->lowest[j] != floor;
            /* Of alike blocks one suffices: whichever is lowest, the rest is the same. */
            for (int k = 0; k < cases && !skip; k++)
                skip = alike(p, list[k], j);
            if (skip)
                continue;
            int at = cases++;
            for (; at > 0 && p->priority[list[at - 1]] < p->priority[j]; at--)
                list[at] = list[at - 1];
            list[at] = j;
        }
        p->pooled -= p->flush[s] - cases;
        i64 bare = spare > 0 ? height_without(p, s) : INT64_MAX;
        for (int k = 0; k < cases; k++) {
            size_t before = p->changes;
            int result = place(p, list[k]) ? solve(p, lo, hi) : INFEASIBLE;
            if (result != INFEASIBLE)
                return result;
            undo(p, before);
        }
        if (bare > floor + spare || !raise_floor(p, s, bare))
            break;
    }
    undo(p, mark);
    known[random_bits(p) % TABLE_WAYS] = hash;
    return INFEASIBLE;
}

/* Place all blocks of sections [lo, hi). What it leaves on the trail is the caller's to undo. */
static int solve(Search *p, int lo, int hi)
{
    size_t pooled_before = p->pooled;
    i32 *starts = pooled(p, hi - lo + 1);
    if (!starts)
        return UNDECIDED;
    int parts = 0, result = FOUND;
    for (int s = lo; s < hi; s++)
        if (s == lo || !p->crossing[s])
            starts[parts++] = s;
    starts[parts] = hi;
    p->pooled = pooled_before + parts + 1;
    /* The shortest first: where one cannot be solved, it is known soonest. */
    for (int length = 1, longest = hi - lo, next; result == FOUND && length <= longest; length = next) {
        next = longest + 1;
        for (int k = 0; k < parts && result == FOUND; k++) {
            int here = starts[k + 1] - starts[k];
            if (here == length && p->count[starts[k]])
                result = branch(p, starts[k], starts[k + 1]);
            else if (here > length && here < next)
                next = here;
        }
    }
    p->pooled = pooled_before;
    return result;
}

/* Luby, Sinclair and Zuckerman (1993): 1 1 2 1 1 2 4 ..., from run 1 on. */
static i64 luby(i64 run)
{
    i64 whole = 1;
    while (whole < run)
        whole = 2 * whole + 1;
    while (whole != run) {
        whole /= 2;
        if (run > whole)
            run -= whole;
        while (whole / 2 >= run)
            whole /= 2;
    }
    return (whole + 1) / 2;
}

/* Longest first, largest area first, highest first, and longest first without regard to size; later
 * runs disturb them at random. */
static void set_priorities(Search *p, int order, int disturbed)
{
    for (int j = 0; j < p->blocks; j++) {
        double length = p->end[j] - p->first[j], size = (double)p->size[j];
        double value = length;
        if (order == 0)
            value = length + size / (double)p->capacity;
        else if (order == 1)
            value = length * size;
        else if (order == 2)
            value = size + length / p->sections;
        if (disturbed)
            value *= 0.85 + 0.3 * (double)(random_bits(p) >> 11) / 9007199254740992.0;
        p->priority[j] = value;
    }
}

static void *zeros(Search *p, size_t count, size_t size)
{
    void *made = calloc(count ? count : 1, size);
    if (!made)
        p->out_of_memory = 1;
    return made;
}

/* Search for offsets below `capacity`.
 *
 * Blocks are sorted by their first section; sizes are above 0. `begun` has sections + 1 items.
 * `offset` gets the offsets if they are found, `told` the nodes and the runs.
 */
int graphopt_search(int blocks, int sections, const i32 *first, const i32 *end, const i64 *size,
                    const i32 *begun, i64 capacity, u64 seed, double seconds, volatile int *stop,
                    i64 *offset, i64 *told)
{
    Search search = {0}, *p = &search;
    p->blocks = blocks;
    p->sections = sections;
    p->words = (blocks + 63) / 64;
    p->first = first;
    p->end = end;
    p->size = size;
    p->begun = begun;
    p->capacity = capacity;
    p->offset = offset;
    p->random = seed * 0x2545f4914f6cdd1dULL;
    p->deadline = now() + seconds;
    p->patience = blocks < 2048 ? 256 : 4;
    p->stop = stop;
    p->trail_room = 1 << 16;
    size_t n = blocks, m = sections;
    p->pool_room = 256 * (n + m) + (1 << 22); /* memory that is not used is not taken */

    p->live = zeros(p, m * p->words, sizeof(u64));
    p->unplaced = zeros(p, p->words, sizeof(u64));
    p->lowest = zeros(p, n, sizeof(i64));
    p->floor = zeros(p, m, sizeof(i64));
    p->waiting = zeros(p, m, sizeof(i64));
    p->count = zeros(p, m, sizeof(i32));
    p->flush = zeros(p, m, sizeof(i32));
    p->crossing = zeros(p, m, sizeof(i32));
    p->set_hash = zeros(p, m, sizeof(u64));
    p->block_hash = zeros(p, n, sizeof(u64));
    p->trail = zeros(p, p->trail_room, sizeof(Change));
    p->stale = zeros(p, m, sizeof(i32));
    p->is_stale = zeros(p, m, 1);
    p->pool = zeros(p, p->pool_room, sizeof(i32));
    p->table = zeros(p, (size_t)TABLE_WAYS << TABLE_BITS, sizeof(u64));
    p->weight = zeros(p, m, sizeof(double));
    p->priority = zeros(p, n, sizeof(double));

    int result = NO_MEMORY;
    if (!p->out_of_memory) {
        for (int j = 0; j < blocks; j++) {
            p->block_hash[j] = random_bits(p);
            count_block(p, j, 1);
            for (int s = first[j]; s < end[j]; s++)
                p->live[(size_t)s * p->words + (j >> 6)] |= 1ULL << (j & 63);
        }
        for (int s = 0; s < sections; s++) {
            p->weight[s] = 1;
            set_stale(p, s);
        }
        result = settle(p) ? UNDECIDED : INFEASIBLE;
        size_t root = p->changes;
        for (i64 run = 0; result == UNDECIDED; run++) {
            set_priorities(p, (int)((seed + run) % 4), run >= 4);
            p->by_weight = (run / 4 + seed / 4) % 2 == 1;
            p->nodes = 0;
            p->limit = BASE_NODES * luby(run + 1) + 2 * (i64)blocks;
            p->pooled = 0;
            result = solve(p, 0, sections);
            told[0] += p->nodes;
            told[1] = run + 1;
            if (p->out_of_memory)
                result = NO_MEMORY;
            else if (result == UNDECIDED) {
                undo(p, root);
                if (expired(p))
                    break;
            }
        }
    }
    free(p->live);
    free(p->unplaced);
    free(p->lowest);
    free(p->floor);
    free(p->waiting);
    free(p->count);
    free(p->flush);
    free(p->crossing);
    free(p->set_hash);
    free(p->block_hash);
    free(p->trail);
    free(p->stale);
    free(p->is_stale);
    free(p->pool);
    free(p->table);
    free(p->weight);
    free(p->priority);
    return result;
}
