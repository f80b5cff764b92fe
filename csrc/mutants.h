// Deliberate mistakes, one at a time, in a build for tests only: the gate must notice each. The shipped build has none.
#pragma once

#define QKV_MUTANTS(X)                                                                  \
    X(rescale_forgotten, "lanes: earlier blocks are not rescaled to the new maximum")   \
    X(last_granule, "lanes: the last 16 keys of a block have no values")                \
    X(head_map, "query heads are dealt to key/value heads in turn")                     \
    X(window_right, "a window ends one key early")                                      \
    X(window_left, "a window begins one key early")                                     \
    X(chunk_twice, "the first chunk of keys is merged twice")                           \
    X(chunk_weights, "chunks are merged as if their maxima were equal")                 \
    X(scale_by_d, "the scale is divided by the square root of D once more")             \
    X(mask_ignored, "partly visible granules count as visible")                         \
    X(cap_after_mask, "the softcap is applied to hidden scores too")                    \
    X(bias_before_cap, "the bias is added before the softcap")                          \
    X(sink_twice, "a sink counts twice")                                                \
    X(lse_base_2, "lse in powers of two")                                               \
    X(last_key, "the last key is dropped")                                              \
    X(first_key, "the first key is dropped")                                            \
    X(poison_passes, "rows spoiled by hidden values are kept")                          \
    X(positions_ignored, "the positions tensor is ignored")                             \
    X(odd_tail, "the value of an odd last key is lost")                                 \
    X(no_maximum, "no maximum is subtracted")                                           \
    X(batch_row, "masks and biases of batch row 0 serve all rows")                      \
    X(padding_side, "padding on the left counts as on the right")                       \
    X(document_by_index, "a query's document is looked up by the wrong number")         \
    X(relative_shift, "the relative table is read one entry late")                      \
    X(alibi_signed, "alibi rewards keys of the future")                                 \
    X(dilated_reach, "a dilated window is one step short")                              \
    X(softcap_ignored, "softcap is accepted and ignored")                               \
    X(dots_rescale, "dots: the sum of weights is not rescaled")                         \
    X(dots_rows, "dots: every second row takes its neighbour's weights")                \
    X(negative_scale, "the sign of the scale is lost")                                  \
    X(stride_ignored, "a last dimension with a stride is read as if it had none")       \
    X(page_next, "a key is read from the page after its own")                           \
    X(page_slot, "all keys of a page are read from its first slot")                     \
    X(page_straight, "sixteen keys always lie one stride apart, whatever the page size") \
    X(scale_keys, "stored keys are read without their scale")                           \
    X(scale_values, "stored values are read without their scale")                       \
    X(cascade_rows, "sequences that share a chunk all get the first one's result")      \
    X(cascade_pages, "sequences with one page in common share the whole chunk")         \
    X(best_weight_lost, "the maximum is taken away after the factor, by a fused product") \
    X(mean_of_values, "all visible keys weigh the same")                                \
    X(dropout_ignored, "dropout is accepted and drops nothing")                         \
    X(back_dropout, "backward: dropout is forgotten in the gradient of scores")         \
    X(back_lse_rounded, "backward: weights come from a rounded lse")                    \
    X(back_score_order, "backward: scores are summed in another order")                 \
    X(back_delta, "backward: the share of the softmax's sum is forgotten")              \
    X(back_lse, "backward: the gradient of lse is ignored")                             \
    X(back_head_map, "backward: query heads are dealt to key/value heads in turn")      \
    X(back_scale, "backward: dK is not scaled")                                         \
    X(back_mask, "backward: partly visible granules count as visible")                  \
    X(back_softcap, "backward: the softcap's slope is 1")                               \
    X(back_poison, "backward: what is hidden may hold NaN and reach gradients")         \
    X(back_last_keys, "backward: the last 16 keys of a step give no dQ")                \
    X(back_relative, "backward: the relative table's gradient lands one entry late")    \
    X(back_bias_last, "backward: a broadcast bias gets the last gradient, not the sum") \
    X(back_sink, "backward: a sink's gradient counts twice")                            \
    X(back_order, "backward: a chunk's dQ replaces those before it")                    \
    X(back_one_head, "backward: a group's first head alone gives dK and dV")            \
    X(back_tail, "backward: the last tile of queries is left out")                      \
    X(back_alibi, "backward: alibi's gradient counts keys of the future as negative")   \
    X(back_dv_ds, "backward: dV is weighted by the unmasked score's gradient")

namespace qkv {
enum Mutant : int {
    kNone = 0,
#define QKV_ENTRY(name, text) kMutant_##name,
    QKV_MUTANTS(QKV_ENTRY)
#undef QKV_ENTRY
};
#ifdef QKV_MUTATE
extern int mutant;  // the mistake that is on
#define QKV_MUTANT(name) (::qkv::mutant == ::qkv::kMutant_##name)
#else
#define QKV_MUTANT(name) false
#endif
}  // namespace qkv
