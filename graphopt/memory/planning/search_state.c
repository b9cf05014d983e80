/* The state of the search in search.c, and what changes it and takes changes back.
 *
 * Every change is noted on a trail. search.c is compiled behind this file, as one.
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
