// SPDX-License-Identifier: Apache-2.0
/* What a plan costs, in pairs of a query and a row, and what its queries' parts cover of their support. */
#include "plan/coverage.h"
#include "plan/plan.h"

#include <string.h>

/* The lanes that a tile computes for a row: whole groups of 16, without those that the mask leaves empty. */
static int64_t computed_lanes(uint64_t mask) {
    int64_t lanes = 0;
    for (; mask; mask >>= 16)
        lanes += mask & 0xffff ? 16 : 0;
    return lanes;
}

static void count_pairs(const cmb_plan *plan, cmb_plan_facts *facts, cmb_cancel *cancel) {
    for (int32_t number = 0; number < plan->tiles; number++) {
        const cmb_tile *tile = plan->tile + number;
        int64_t pairs = 0;
        for (int32_t n = tile->run; n < tile[1].run; n++) {
            const cmb_run *run = plan->run + n;
            if (cmb_tick(cancel, run->mask < 0 ? 1 : run->row.count))
                return;
            if (run->mask < 0) {
                pairs += (int64_t)run->row.count * tile->query.count;
                facts->computed_pairs += (int64_t)run->row.count * tile->width;
                continue;
            }
            for (int32_t row = 0; row < run->row.count; row++) {
                uint64_t mask = plan->mask[run->mask + row];
                pairs += __builtin_popcountll(mask);
                facts->computed_pairs += tile->width == 1 ? 1 : computed_lanes(mask);
            }
        }
        bool is_attend = cmb_list_at(plan, tile->query, 0) < plan->L;
        *(is_attend ? &facts->attend_pairs : &facts->summarize_pairs) += pairs;
    }
}

/* From the positions' words word[0 .. L) makes the regions', word[L .. L+R), and the queries', got[0 .. L): the sum, or
 * the union, of the words of the rows that each attends. */
static void gather_words(const cmb_plan *plan, bool is_union, uint64_t *word, uint64_t *got, cmb_cancel *cancel) {
    memset(word + plan->L, 0, (size_t)plan->R * sizeof *word);
    memset(got, 0, (size_t)plan->L * sizeof *got);
    for (int32_t number = 0; number < plan->tiles && !cmb_tick(cancel, 64); number++) {
        const cmb_tile *tile = plan->tile + number;
        uint64_t lane[64] = {0}, shared = 0;
        for (int32_t n = tile->run; n < tile[1].run; n++) {
            const cmb_run *run = plan->run + n;
            if (cmb_tick(cancel, run->row.count))
                return;
            for (int32_t row = 0; row < run->row.count; row++) {
                uint64_t key = word[cmb_list_at(plan, run->row, row)];
                if (run->mask < 0)
                    shared = cmb_join(shared, key, is_union);
                else if (key)
                    for (uint64_t mask = plan->mask[run->mask + row]; mask; mask &= mask - 1)
                        lane[__builtin_ctzll(mask)] = cmb_join(lane[__builtin_ctzll(mask)], key, is_union);
            }
        }
        for (int32_t t = 0; t < tile->query.count; t++) {
            int32_t query = cmb_list_at(plan, tile->query, t);
            uint64_t *to = query < plan->L ? got + query : word + query;
            *to = cmb_join(*to, cmb_join(lane[t], shared, is_union), is_union);
        }
    }
}

/* Whether every query's parts are a partition of its support, with a chance of 2^-64 of a wrong yes. */
static bool sums_to_support(const cmb_plan *plan, uint64_t *word, uint64_t *got, cmb_cancel *cancel) {
    uint64_t support = 0;
    for (int64_t j = 0; j < plan->L && !cmb_tick(cancel, 2); j++)
        support += word[j] = cmb_position_word(j);
    gather_words(plan, false, word, got, cancel);
    if (cmb_tick(cancel, 0)) /* cancelled: words are missing */
        return false;
    uint64_t before = 0;
    for (int64_t i = 0; i < plan->L; i++) {
        before += word[i];
        if (got[i] != (plan->is_causal ? before : support))
            return false;
    }
    return true;
}

/* Whether every query's parts cover its support: exact, 64 positions at a time, one bit for each. */
static bool covers_support(const cmb_plan *plan, uint64_t *word, uint64_t *got, cmb_cancel *cancel) {
    memset(word, 0, (size_t)plan->L * sizeof *word);
    for (int64_t first = 0; first < plan->L && !cmb_tick(cancel, plan->L); first += 64) {
        int64_t end = first + 64 < plan->L ? first + 64 : plan->L;
        for (int64_t j = first; j < end; j++)
            word[j] = UINT64_C(1) << (j - first);
        gather_words(plan, true, word, got, cancel);
        for (int64_t i = plan->is_causal ? first : 0; i < plan->L; i++) {
            uint64_t support = cmb_lane_mask(0, plan->is_causal && i < end ? i + 1 - first : end - first);
            if (got[i] != support)
                return false;
        }
        memset(word + first, 0, (size_t)(end - first) * sizeof *word);
    }
    return true;
}

cmb_status cmb_plan_measure(const cmb_plan *plan, const cmb_interrupt *interrupt, cmb_plan_facts *facts,
                            cmb_error *error) {
    *facts = (cmb_plan_facts){0};
    if (!plan)
        return cmb_fail(error, CMB_ERR_VALUE, "plan is missing");
    if (plan->is_slice)
        return cmb_fail(error, CMB_ERR_VALUE, "plan must be whole, got a slice");
    cmb_cancel cancel;
    cmb_cancel_init(&cancel, interrupt);
    size_t words = (size_t)(2 * plan->L + plan->R) + 1, bytes;
    uint64_t *word = cmb_multiply(words, sizeof *word, &bytes) ? cmb_allocate(bytes) : NULL;
    if (!word)
        return cmb_fail(error, CMB_ERR_MEMORY, "out of memory: measuring a plan takes %zu words", words);
    uint64_t *got = word + plan->L + plan->R;
    count_pairs(plan, facts, &cancel);
    facts->is_partition = sums_to_support(plan, word, got, &cancel);
    facts->is_full = facts->is_partition || covers_support(plan, word, got, &cancel);
    cmb_release(word);
    return cmb_cancel_status(&cancel, error);
}
