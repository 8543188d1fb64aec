// SPDX-License-Identifier: Apache-2.0
/* A decoder's life: it is made, rolled back, copied and freed. */
#include "decode/decoder.h"
#include "plan/read.h"
#include "runtime/memory.h"

#include <math.h>
#include <string.h>

/* The caller's sinks to the decoder's own memory, which its options name from then on. */
static void copy_sinks(cmb_decoder *d, char *to) {
    cmb_decoder_options *o = &d->options;
    const size_t size = d->stage->size;
    for (int64_t b = 0; b < o->B; b++)
        for (int64_t h = 0; h < o->Hq; h++)
            memcpy(to + (size_t)(b * o->Hq + h) * size,
                   (const char *)o->sink.data + (b * o->sink.batch + h * o->sink.head) * (int64_t)size, size);
    o->sink = (cmb_array){.data = to, .heads = o->Hq, .batch = o->Hq, .head = 1, .row = 1};
}

cmb_status cmb_decoder_new(const cmb_decoder_options *o, cmb_decoder **decoder, cmb_error *error) {
    cmb_decoder d = {.options = *o};
    size_t bytes;
    *decoder = NULL;
    TRY(cmb_check_decoder_options(o, error));
    cmb_find_levels(&d);
    if (o->select > 0 && (d.made != CMB_SUMMARIES || o->pattern.kind == CMB_AXIAL))
        return cmb_fail(error, CMB_ERR_VALUE, "select must be 0 for %s, got %lld",
                        o->pattern.kind == CMB_AXIAL ? "Axial" : "a pattern without regions", (long long)o->select);
    d.stage = cmb_stage_table_of(o->dtype);
    d.scale = o->scale != 0 ? o->scale : signbit(o->scale) ? 0 : cmb_default_scale(o->D);
    d.options.rollback = cmb_min(o->rollback, INT64_C(1) << 30);
    size_t sinks;
    if (!cmb_multiply((size_t)o->B, sizeof *d.sequence, &bytes) || !cmb_add(bytes, sizeof d, &bytes) ||
        !cmb_multiply((size_t)o->B, (size_t)o->Hq, &sinks) || !cmb_multiply(sinks, d.stage->size, &sinks) ||
        !cmb_add(bytes, sinks, &sinks))
        return cmb_fail(error, CMB_ERR_OVERFLOW, "B * Hq heads do not fit in 64 bits");
    cmb_decoder *made = cmb_allocate(o->sink.data ? sinks : bytes);
    if (!made)
        return cmb_fail(error, CMB_ERR_MEMORY, "no memory for a decoder of %lld sequences", (long long)o->B);
    *made = d;
    made->sequence = (cmb_sequence *)(void *)(made + 1);
    memset(made->sequence, 0, (size_t)o->B * sizeof *d.sequence);
    if (o->sink.data)
        copy_sinks(made, (char *)made + bytes);
    *decoder = made;
    return CMB_OK;
}

cmb_status cmb_decoder_rollback(cmb_decoder *d, const int64_t *n, bool per_sequence, cmb_error *error) {
    for (int64_t b = 0; b < d->options.B; b++) {
        const cmb_sequence *s = &d->sequence[b];
        const int64_t back = n[per_sequence ? b : 0], most = d->options.rollback - (s->longest - s->length);
        if (back < 0 || back > s->length || back > most)
            return cmb_fail(error, CMB_ERR_VALUE, "n must be between 0 and %lld, got %lld",
                            (long long)cmb_min(most, s->length), (long long)back);
    }
    for (int64_t b = 0; b < d->options.B; b++)
        d->sequence[b].length -= n[per_sequence ? b : 0];
    return CMB_OK;
}

/* Sequence b is d's sequence chosen[b], or b where `chosen` is NULL. */
static cmb_status copy_sequences(const cmb_decoder *d, const int64_t *chosen, int64_t count, cmb_decoder **copy,
                                 cmb_error *error) {
    const size_t sinks = (size_t)d->options.Hq * d->stage->size; /* of a sequence */
    cmb_decoder_options options = d->options;
    options.B = count;
    options.sink.batch = 0; /* d may have fewer sequences; each gets its own below */
    cmb_status status = cmb_decoder_new(&options, copy, error);
    for (int64_t b = 0; !status && b < count; b++) {
        const int64_t from = chosen ? chosen[b] : b;
        status = cmb_copy_sequence(d, &d->sequence[from], &(*copy)->sequence[b], error);
        if (options.sink.data)
            memcpy((char *)(*copy)->options.sink.data + (size_t)b * sinks,
                   (const char *)d->options.sink.data + (size_t)from * sinks, sinks);
    }
    if (status) {
        cmb_decoder_free(*copy);
        *copy = NULL;
    }
    return status;
}

cmb_status cmb_decoder_copy(const cmb_decoder *d, cmb_decoder **copy, cmb_error *error) {
    return copy_sequences(d, NULL, d->options.B, copy, error);
}

cmb_status cmb_decoder_take(const cmb_decoder *d, const int64_t *chosen, int64_t count, cmb_decoder **taken,
                            cmb_error *error) {
    *taken = NULL;
    if (count < 0)
        return cmb_fail(error, CMB_ERR_VALUE, "count must not be negative, got %lld", (long long)count);
    for (int64_t b = 0; b < count; b++)
        if (chosen[b] < 0 || chosen[b] >= d->options.B)
            return cmb_fail(error, CMB_ERR_VALUE, "chosen must be between 0 and %lld, got %lld",
                            (long long)d->options.B - 1, (long long)chosen[b]);
    return copy_sequences(d, chosen, count, taken, error);
}

int64_t cmb_decoder_length(const cmb_decoder *d, int64_t b) { return d->sequence[b].length; }

size_t cmb_decoder_bytes(const cmb_decoder *d) {
    size_t bytes = 0;
    for (int64_t b = 0; b < d->options.B; b++)
        bytes += d->sequence[b].positions.bytes + d->sequence[b].regions.bytes + d->sequence[b].queries.bytes;
    return bytes;
}

void cmb_decoder_free(cmb_decoder *d) {
    for (int64_t b = 0; d && b < d->options.B; b++)
        cmb_release_sequence(&d->sequence[b]);
    cmb_release(d);
}
