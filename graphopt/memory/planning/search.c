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
 * That solutions can be pushed down, and sections with their floors, are MiniMalloc's (Moffitt,
 * ASPLOS 2023); the choice by fewest cases is that of exact cover (Knuth, "Dancing Links"), weights
 * are those of Boussemart et al. (ECAI 2004).
 *
 * Compiled behind search_state.c, as one file.
 */
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
