"""Deliberate mistakes of the native kernels: what is wrong, and the one place in csrc where.

The build with -DQKV_MUTANTS=ON compiles a copy of csrc that holds all of them, one of which a number switches on:

    python tests/kit/native_mutants.py csrc build/csrc    # writes the copy; CMake calls it

A place is the text of the source, up to white space, and has to occur there exactly once. What stands between « and »
is what the mistake replaces: an expression by another, or nothing by statements. The shipped kernels know nothing of
all this.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

SWITCH = "qkv_mutant"  # the number in the mutated module; 0: no mistake


@dataclass(frozen=True)
class Edit:
    """One place, and what stands there instead."""

    file: str
    place: str
    wrong: str


@dataclass(frozen=True)
class Mutant:
    """One mistake."""

    name: str
    what: str
    edits: tuple[Edit, ...]


def _mutant(name: str, what: str, *edits: tuple[str, str, str]) -> Mutant:
    return Mutant(name, what, tuple(Edit(*edit) for edit in edits))


KEYS, SCORE, STATE = "kernel/keys.h", "kernel/score.h", "kernel/rowstate.h"
ELEMENTS = "kernel/elements.h"
LANES, DOTS, FORWARD = "kernel/lanes.h", "kernel/dots.h", "kernel/forward.cpp"
SCHEDULE, CASCADE, MASK = "kernel/schedule.h", "kernel/cascade.h", "mask/atoms.h"
PROGRAM = "mask/program.h"
BACKWARD, PRODUCTS, BIAS = "kernel/backward.h", "kernel/products.h", "kernel/bias_sums.h"
BANDS = "kernel/bands.h"
OBSERVE, TALLY = "kernel/observe.h", "kernel/tally.h"

LOOKS = "look_"
"""How names of mistakes begin that change no output: only statistics of weights see them."""

# fmt: off
MUTANTS = (
    _mutant("unseen_chunk", "few rows: a chunk of which nothing is seen keeps the sums that memory held",
            (FORWARD, "partial_states[partial(c, kv_head, chunk, r)] = «RowState<E, 2>::none()»;",
             "partial_states[partial(c, kv_head, chunk, r)]")),
    _mutant("first_keys_alone", "few rows: a chunk whose first keys are hidden counts as hidden",
            (DOTS, "return «!w.walk.over()»;", "w.walk.position() < k0 + kGranule")),
    _mutant("rescale_forgotten", "lanes: earlier blocks are not rescaled to the new maximum",
            (LANES, "keep[z] = «shift.keep»;", "V::set1(1)")),
    _mutant("last_granule", "lanes: the last 16 keys of a block have no values",
            (LANES, "const int granules = «block.granules»;", "block.granules - 1")),
    _mutant("converted_kept", "a task takes over the converted keys and values of the one before",
            (FORWARD, "auto& work = *memory.work; «work.converted.clear()»; if (c.pairs >= 0)", "void()")),
    _mutant("converted_lost", "converted granules that a block uses make room for its others",
            (LANES, "while («used >> oldest & 1») oldest", "false")),
    _mutant("converted_evicted", "converted granules that a block uses from before make room for its new ones",
            (LANES, "place[g] = at; used |= «1u << at», there", "0u")),
    _mutant("halves_shuffled", "dots: sums of widened halves stay in the order in which they were loaded",
            (ELEMENTS, "mended[d] = at[«place(d)»];", "d")),
    _mutant("head_map", "query heads are dealt to key/value heads in turn",
            (SCHEDULE,
             "rows.head[r] = «kv_head * job.group + (c.by_query ? x % job.group : c.by_head ? head : x / s.q_count)»;",
             "(c.by_head ? head : x / s.q_count) * a.Hkv + kv_head")),
    _mutant("window_right", "a window ends one key early",
            (MASK, "b = w[2] < 0 ? kFar : «p + w[2] + 1»;", "p + w[2]")),
    _mutant("window_left", "a window begins one key early",
            (MASK, "a = w[1] < 0 ? -kFar : «p - w[1]»;", "p - w[1] - 1")),
    _mutant("chunk_twice", "the first chunk of keys is merged twice",
            (FORWARD, "static_cast<E>(job.factor));«»",
             "if (x == 0) state.merge(partial_states[from], static_cast<E>(job.factor));"),
            (FORWARD, "total[d] = first ? «w» * o[d] : total[d] + w * o[d];", "(x == 0 ? 2 * w : w)")),
    _mutant("chunk_weights", "chunks are merged as if their maxima were equal",
            (STATE, "const N w = «std::exp2(x)»;", "N(1)")),
    _mutant("scale_by_d", "the scale is divided by the square root of D once more",
            (SCORE, "const double scale = «a.scale», size", "a.scale / std::sqrt(static_cast<double>(a.D))")),
    _mutant("mask_ignored", "partly visible granules count as visible",
            (KEYS, "block.masked |= «words != nullptr»;", "false")),
    _mutant("cap_after_mask", "the softcap is applied to hidden scores too",
            (LANES, "score.template of<Scaled>(«V::load(at)», key_scale",
             "block.masked ? shown(block.words[j] >> (first + z * W), V::load(at)) : V::load(at)"),
            (LANES, "if («block.masked») x = shown(block.words[j] >> (first + z * W), x);", "false")),
    _mutant("bias_before_cap", "the bias is added before the softcap",
            (SCORE, "if constexpr (Scaled) x = x * key_scale;«»", "if (biased_) x = x + V::load(bias);"),
            (SCORE, "return «biased_» ? x + V::load(bias) : x;", "false")),
    _mutant("sink_twice", "a sink counts twice",
            (STATE, "+ «std::exp(static_cast<Wide>(sink) - static_cast<Wide>(top))»;",
             "2 * std::exp(static_cast<Wide>(sink) - static_cast<Wide>(top))")),
    _mutant("lse_base_2", "lse in powers of two",
            (STATE, "end.lse = static_cast<N>(«static_cast<Wide>(end.m) * unit + std::log(static_cast<Wide>(end.l))»);",
             "(static_cast<Wide>(end.m) * unit + std::log(static_cast<Wide>(end.l))) * static_cast<Wide>(kLog2e)")),
    _mutant("last_key", "the last key is dropped",
            (KEYS, "if («!in» || full.first[full_] > at_) {", "true"),
            (KEYS, "if («in») end = lower(end, round_up(full.first[full_], kGranule));",
             "in && full.first[full_] > at_"),
            (KEYS, "program_->bits(*rows_, sieve_, at_, n, scratch, words_); }«»",
             "if (at_ + n >= rows_->key_count) words_[rows_->key_count - 1 - at_] = 0;")),
    _mutant("first_key", "the first key is dropped",
            (KEYS, "if (!in || «full.first[full_] > at_») {", "at_ == 0 || full.first[full_] > at_"),
            (KEYS, "end = lower(end, «round_up(full.first[full_], kGranule)»);",
             "full.first[full_] > at_ ? round_up(full.first[full_], kGranule) : end"),
            (KEYS, "program_->bits(*rows_, sieve_, at_, n, scratch, words_); }«»", "if (at_ == 0) words_[0] = 0;")),
    _mutant("gathered_neighbour", "gathered keys: each is taken for the next one",
            (KEYS, "waiting_keys_[waiting_] = «sieve_.key(place + j)»;",
             "lower(sieve_.key(place + j) + 1, count_ - 1)")),
    _mutant("gathered_rest", "gathered keys: the last ones, fewer than 16, are dropped",
            (KEYS, "if (waiting_ > 0 && block.granules < Most) «push_waiting(block)»;", "void(waiting_ = 0)")),
    _mutant("gathered_again", "gathered keys: those of another granule are taken where one was converted",
            (LANES, "key[oldest] = «block.regular(g) ? block.key[g] : -1»;", "block.key[g]"),
            (LANES, "at < kGranules && «block.regular(g)»; ++at)", "true")),
    _mutant("gathered_bias", "gathered keys: score terms of the keys after the first",
            (SCORE, "return «Picked ? picked[j] : j0 + j»; };", "(Picked ? picked[0] : j0) + j")),
    _mutant("gathered_dropout", "gathered keys: dropout's draws are those of the keys after the first",
            (LANES, "draw_index(«block.at(j / kGranule, j % kGranule)»)", "block.key[j / kGranule] + j % kGranule"),
            (DOTS, "draw_index(«block.at(j / kGranule, j % kGranule)»)", "block.key[j / kGranule] + j % kGranule")),
    _mutant("gathered_scales", "gathered keys: the scales of 8-bit keys are those of the keys after the first",
            (KEYS, "const int64_t j = «block.at(g, i)», number", "lower(block.key[g] + i, s.k_count - 1)")),
    _mutant("residue_rows", "rows of one residue: each is taken for the one before",
            (SCHEDULE, "if (c.step > 1) return {«band», (s.q_count - band + c.step - 1) / c.step};",
             "upper(band - 1, 0)")),
    _mutant("residue_keys", "rows of one residue: keys that a mask's offset was taken from",
            (SCHEDULE, "floor_mod(«rows.position[0] - job.pattern.offset», c.step);",
             "rows.position[0] + job.pattern.offset")),
    _mutant("residue_short", "rows of one residue: the last one is left out where others have one fewer",
            (SCHEDULE, "if (c.step > 1) return {band, «(s.q_count - band + c.step - 1) / c.step»};",
             "s.q_count / c.step")),
    _mutant("portion_position", "a portion of a mask: queries stand where the part says, not the whole",
            (PROGRAM, "rows.position[r] = «part.position[r] + w[1]»;", "part.position[r]")),
    _mutant("portion_query", "a portion of a mask: queries are counted from the part's first",
            (PROGRAM, "rows.index[r] = «part.index[r] + w[2]»;", "part.index[r]")),
    _mutant("portion_keys", "a portion of a mask: there are no more keys than the part has",
            (PROGRAM, "rows.key_count = «w[4]»;", "part.key_count")),
    _mutant("portion_first_key", "a portion of a mask: keys are counted from the part's first",
            (PROGRAM, "sieve.first = asked.first + «w[1]»;", "0")),
    _mutant("portion_first_key_twice", "a portion of a mask: its first key is added twice",
            (PROGRAM, "sieve.first = «asked.first» + w[1];", "asked.first + w[1]")),
    _mutant("portion_head", "a portion of a mask: all heads see what the first sees",
            (PROGRAM, "rows.head[r] = «part.head[r]»;", "0")),
    _mutant("portion_comb", "a portion of a mask counts as one that sees a comb of keys, whatever it is made of",
            ("mask/pattern.h", "found.listed = inner.listed, found.by_head |= inner.by_head; return «comb»;",
             "Comb{3, 0}")),
    _mutant("residue_either", "either of two strided masks: keys of the first one's step",
            ("mask/pattern.h", "return {«std::gcd(std::gcd(a.step, b.step), a.offset < b.offset ? b.offset - a.offset "
             ": a.offset - b.offset)», a.offset,", "upper(a.step, b.step)")),
    _mutant("block_rows", "rows of a block: those of the last one are left out",
            (SCHEDULE, "«floor_div(s.position + s.q_count - 1, block) - floor_div(s.position, block) + 1»;",
             "floor_div(s.position + s.q_count - 1, block) - floor_div(s.position, block)")),
    _mutant("vector_first", "steps of some vectors: the rows that see a key are counted from the tile's first",
            (LANES, "acc[k][z] = shown(of.words[k] >> («of.first» + z * W), acc[k][z]);", "0")),
    _mutant("vector_state", "steps of some vectors: another vector's sums count as none",
            (LANES, "(s.begun & «these») == 0, first};", "1u << (first / W + Z - 1)")),
    _mutant("vector_dropout", "steps of some vectors: dropout's draws are those of the tile's first rows",
            (LANES, "keep_bits(s.draws + «first» + r, key,", "0")),
    _mutant("short_list", "lists of ranges that are too short are taken for whole",
            ("mask/ranges.h", "to.end = «lower(to.end, to.last[to.count - 1])»;", "to.end"),
            ("mask/ranges.h", "if (Superset) «to.last[to.count - 1] = b»;", "b")),
    _mutant("beyond_known", "keys between a list that was too short and its last ranges are passed over",
            (KEYS, "range_ < seen.count && («open_ || seen.first[range_] < known_»);", "true")),
    _mutant("poison_passes", "rows spoiled by hidden values are kept",
            (LANES, "if («!s.masked») return false;", "true"),
            (DOTS, "if («!w.masked») return false;", "true")),
    _mutant("positions_ignored", "the positions tensor is ignored",
            (SCHEDULE, "rows.position[r] = «s.positions != nullptr» ? ", "false")),
    _mutant("odd_tail", "the value of an odd last key is lost",
            (LANES, "b = j + 1 < keys ? v.row(j + 1) : nullptr; }«»", "if (j + 2 > keys - 1) b = nullptr;")),
    _mutant("no_maximum", "no maximum is subtracted",
            (STATE, "m = «larger(m, top)»;", "N{}")),
    _mutant("batch_row", "masks and biases of batch row 0 serve all rows",
            (MASK, "{ return «rows.batch»; }", "int64_t(0)")),
    _mutant("padding_side", "padding on the left counts as on the right",
            (MASK, "const bool left = «w[2] != 0»;", "false")),
    _mutant("document_by_index", "a query's document is looked up by the wrong number",
            (MASK, "const int64_t x = «w[1] != 0» ? rows.index[r] : p;", "w[1] == 0")),
    _mutant("relative_shift", "the relative table is read one entry late",
            (SCORE, "clamp(«key(j) - p», -bias.reach", "key(j) - p + 1")),
    _mutant("alibi_signed", "alibi rewards keys of the future",
            (SCORE, "static_cast<E>(«away < 0» ? -away : away)", "false")),
    _mutant("dilated_reach", "a dilated window is one step short",
            (MASK, "far = «w[1]» * w[2];", "w[1] - 1")),
    _mutant("selected_next", "each selected block is the one after it",
            (MASK, "f(«static_cast<int64_t>(sorted[i])»);", "static_cast<int64_t>(sorted[i]) + 1")),
    _mutant("selected_last", "the last entry of a list of blocks is dropped",
            (MASK, "i = first_at(sorted, n, from); «i < n» && sorted[i] < to;", "i < n - 1")),
    _mutant("selected_group", "lists of blocks are dealt to query heads in turn",
            (MASK, "h = «rows.head[r] / (heads_ / w[4])»;", "rows.head[r] % w[4]")),
    _mutant("softcap_ignored", "softcap is accepted and ignored",
            (SCORE, "if («capped_») x = cap_", "false")),
    _mutant("dots_rescale", "dots: the sum of weights is not rescaled",
            (DOTS, "state.absorb(«keep», first_lane(shift.by)", "E(1)")),
    _mutant("dots_live", "dots: a key that begins a group of sums is left out where it is the last of all",
            (DOTS, "for (int g = 0; g < «of.live»; g += kAtOnce)", "of.live - 1")),
    _mutant("dots_rows", "dots: every second row takes its neighbour's weights",
            (DOTS, "P::broadcast(of.pairs[«r» * kWindowKeys / 2 + j / 2]);", "r & ~1"),
            (DOTS, "V::set1(of.weights[«r» * kWindowKeys + j]);", "r & ~1")),
    _mutant("negative_scale", "the sign of the scale is lost",
            (SCORE, "negate = !transform && «scale < 0»;", "false")),
    _mutant("stride_ignored", "a last dimension with a stride is read as if it had none",
            (LANES, "of_k.first != nullptr && «a.k_stride[2] == 1» &&", "true"),
            (DOTS, "if («source.stride_d == 1» && (M::kParts", "true")),
    _mutant("page_next", "a key is read from the page after its own",
            (KEYS, "const int64_t number = «pages[j / page_size]»;", "pages[j / page_size] + 1")),
    _mutant("page_slot", "all keys of a page are read from its first slot",
            (KEYS, "base + number * page + «j % page_size» * stride;", "int64_t(0)")),
    _mutant("page_straight", "sixteen keys always lie one stride apart, whatever the page size",
            (KEYS, "return pages == nullptr || «page_size % kGranule == 0»;", "true")),
    _mutant("scale_keys", "stored keys are read without their scale",
            (SCORE, "x = x * «key_scale»;", "V::set1(1)")),
    _mutant("scale_values", "stored values are read without their scale",
            (LANES, "if («scaled») x = x * V::set1(work.v_scales[j]);", "false"),
            (DOTS, "for (int j = 0; «j < n»; j += W) (V::load(s + j) * V::load(w.v_scales + j))", "false")),
    _mutant("cascade_rows", "sequences that share a chunk all get the first one's result",
            (FORWARD, "keep(partial(c, kv_head, share.chunk, row), work.out + «r» * width,", "row"),
            (FORWARD, "work.softmax.row(static_cast<int>(«r»)));", "row")),
    _mutant("cascade_pages", "sequences with one page in common share the whole chunk",
            (CASCADE, "const size_t n = «static_cast<size_t>(last - first + 1)»;", "size_t(1)")),
    _mutant("best_weight_lost", "the maximum is taken away after the factor, by a fused product",
            (STATE, "«»return (score - m) * factor;",
             "return minimum(V::zero(), fused(score, factor, V::zero() - m * factor));")),
    _mutant("mean_of_values", "all visible keys weigh the same",
            (STATE, "«»return (score - m) * factor;",
             "return (score - m) * factor * V::set1(static_cast<typename V::E>(1e-30));")),
    _mutant("dropout_ignored", "dropout is accepted and drops nothing",
            (LANES, "if («drops») x = choose(", "false"),
            (DOTS, "if («a.dropout_below > 0») drop(", "false")),
    _mutant("back_dropout", "backward: dropout is forgotten in the gradient of scores",
            (BACKWARD, "«dp = choose(kept, dp * grown, zero)»;", "dp")),
    _mutant("back_lse_rounded", "backward: weights come from a rounded lse",
            (BACKWARD, "«»// A row that sees nothing gets weights of 0, whatever its scores.",
             "w.m[r] = static_cast<E>(w.m[r] + std::log(w.inverse[r]) / job_.unit), w.inverse[r] = 1;")),
    _mutant("back_score_order", "backward: scores are summed in another order",
            (PRODUCTS, "n = «score_run(f.count - u)»;", "lower(2, f.count - u)")),
    _mutant("back_last_rows", "backward: the last four rows of a product are left out",
            (PRODUCTS, "for (; «left > 0»; left -= 4)", "left > 4")),
    _mutant("back_delta", "backward: the share of the softmax's sum is forgotten",
            (BACKWARD, "delta_[row] = «delta»;", "E(0)")),
    _mutant("back_lse", "backward: the gradient of lse is ignored",
            (BACKWARD, "rise_[row] = «b_.d_lse != nullptr» ? ", "false")),
    _mutant("back_head_map", "backward: neighbouring query heads change places",
            (BANDS, "rows.head[r] = «kv_head * group_ + (by_head_ ? head : by_query_ ? x % group_ : x / s.q_count)»;",
             "(kv_head * group_ + (by_head_ ? head : by_query_ ? x % group_ : x / s.q_count)) ^ 1")),
    _mutant("back_scale", "backward: dK is not scaled",
            (BACKWARD, "write(w.d_k + j * D_, «static_cast<E>(a_.scale)»,", "E(1)")),
    _mutant("back_mask", "backward: partly visible granules count as visible",
            (BACKWARD, "const bool masked = «w.parts[g].masked»;", "false")),
    _mutant("back_softcap", "backward: the softcap's slope is 1",
            (SCORE, "return of<false>(product, product, bias, «&slope»);", "nullptr")),
    _mutant("back_poison", "backward: what is hidden may hold NaN and reach gradients",
            (BACKWARD, "w.bad_keys[j] = «!clean»;", "false"),
            (BACKWARD, "if («!clean») w.bad_rows |= UINT64_C(1) << r;", "false"),
            (BACKWARD, "if (!there || «!clean») std::memset(", "false")),
    _mutant("back_last_keys", "backward: the last 16 keys of a step give no dQ",
            (BACKWARD, ".count = «keys / kPair»,", "keys / kPair - kGranule / kPair")),
    _mutant("back_relative", "backward: the relative table's gradient lands one entry late",
            (BIAS, "copy[clamp(«away», -bias.reach", "away + 1")),
    _mutant("back_bias_last", "backward: a broadcast bias gets the last gradient, not the sum",
            (BIAS, "«»if (d.wide) static_cast<double*>(d.data)[to] += static_cast<double>(ds);",
             "d.wide ? static_cast<double*>(d.data)[to] = static_cast<double>(ds) : static_cast<E*>(d.data)[to] = ds; "
             "continue;")),
    _mutant("back_sink", "backward: a sink's gradient counts twice",
            (BACKWARD, "total -= «share» * (static_cast<double>(delta_[row])", "2 * share")),
    _mutant("back_order", "backward: a chunk's dQ replaces those before it",
            (BACKWARD, "(«V::load(to + d) + V::load(from + d)»).store(to + d);", "V::load(from + d)")),
    _mutant("back_one_head", "backward: a group's first head alone gives dK and dV",
            (BACKWARD, "«»if (!fill(at, g, bands_.tile(*c.sequence, c.sieve.first, x), w.tile) || !tile(c, w))",
             "if (group_ > 1 && bands_.tile(*c.sequence, c.sieve.first, x) >= tiles_ / group_) continue;")),
    _mutant("back_tail", "backward: the last tile of queries is left out",
            (BACKWARD, "«»if (!fill(at, g, bands_.tile(*c.sequence, c.sieve.first, x), w.tile) || !tile(c, w))",
             "if (x == 0 && some > 1) continue;")),
    _mutant("back_alibi", "backward: alibi's gradient counts keys of the future as negative",
            (BIAS, "static_cast<double>(«away < 0» ? -away : away);", "true")),
    _mutant("back_dv_ds", "backward: dV is weighted by the unmasked score's gradient",
            (BACKWARD, "to_keys(«w.p», w.do_rows, Dv_, w.d_v);", "w.dx")),
    _mutant("back_neighbour", "backward: what is gathered for a key is added to its neighbour's gradient",
            (BACKWARD, "E* own = to + «w.places[g * kGranule + i]» * width;", "(w.places[g * kGranule + i] ^ 1)")),
    _mutant("back_scattered_few", "backward: the last of sixteen gathered keys gets no gradient",
            (BACKWARD, "for (int i = 0; i < «block.live[g]»; ++i) { E* own", "block.live[g] - 1")),
    _mutant("back_last_gathered", "backward: a block's last granule is left out where its keys were gathered",
            (BACKWARD, "find_rows(w, block, g, part);«»",
             "if (g + 1 == block.granules && !part.straight) part.row1 = part.row0;")),
    _mutant("back_one_key", "backward: a range of one key does not count as a reason to visit a chunk",
            (BACKWARD, "visits.add(before + «seen.first[i]» / chunk_,",
             "seen.last[i] - seen.first[i] > 1 ? seen.first[i] : seen.first[i] + chunk_")),
    _mutant("back_rows", "backward: the last vector of rows that see some of a granule's keys is left out",
            (BACKWARD, "part.row1 = any == 0 ? 0 : round_up(«64 - std::countl_zero(any)», kRowUnit);",
             "upper(0, std::countr_zero(any) / kRowUnit == (63 - std::countl_zero(any)) / kRowUnit "
             "? 64 - std::countl_zero(any) : 64 - std::countl_zero(any) - kRowUnit)")),
    _mutant("back_straight", "backward: sixteen gathered keys are taken for neighbours",
            (BACKWARD, "part.straight = «at[last] - at[0] == last» &&", "true")),
    _mutant("back_gathered_values", "backward: the values of all gathered granules are those of the first",
            (BACKWARD, "c.v_stride : w.v_some + «g * kGranule» * c.v_stride;", "0")),
    _mutant("back_drawn", "backward: dropout's numbers of gathered keys are those of their neighbours",
            (BACKWARD, "draw_index(«block.at(g, j)»), a.dropout_below", "block.key[g] + j")),
    _mutant("back_bias_place", "backward: the bias of a gathered key gets its neighbour's gradient",
            (BACKWARD, "bias_.add(place_of(c), w.tile.rows, r, «block.at(g, j)», w.ds", "block.key[g] + j")),
    _mutant("back_row_whole", "backward: a granule that one row sees whole counts as visible to all",
            (BACKWARD, "part.masked = «all != all_rows(w.tile.rows)»;", "all == 0")),
    _mutant("look_lost", "statistics: what an entropy is made of is lost with each block of keys",
            (STATE, "scaled_sum(scaled_sum(sums[0], by, sums[1]), «keep», block[1]);", "keep - keep")),
    _mutant("look_delta", "statistics: exponents of earlier blocks stay those of the smaller maximum",
            (STATE, "sums[1] = scaled_sum(«scaled_sum(sums[0], by, sums[1])», keep, block[1]);", "sums[1]")),
    _mutant("look_merge", "statistics: so do those of chunks that are merged",
            (STATE, "part.sums[0] * «larger(N(kGone), x)»);", "N(0)")),
    _mutant("look_hidden", "statistics: a hidden key's weight of 0 is multiplied by its infinite exponent",
            (LANES, "moment[z] = fma(y, «there(x)», moment[z]);", "x"),
            (DOTS, "t = fma(e, «there(x)», t);", "x")),
    _mutant("look_base", "statistics: an entropy mixes nats and bits",
            (STATE, "static_cast<Wide>(sums[1]) / «static_cast<Wide>(kLog2e)», w = 1;", "Wide(1)")),
    _mutant("look_sink", "statistics: a sink is no outcome of its own",
            (STATE, "moment = w * (moment + total * down) + «e * e_down»;", "Wide(0)")),
    _mutant("look_sink_weight", "statistics: the largest weight is the sink's, if that is larger",
            (STATE, "static_cast<N>(«w / total»), static_cast<N>(entropy)", "1 / total")),
    _mutant("look_unit", "statistics: the largest score is not scaled",
            (STATE, "static_cast<N>(static_cast<Wide>(m) * «static_cast<Wide>(job.unit)»),", "Wide(1)")),
    _mutant("look_tie", "statistics: of equal scores the higher key goes first",
            (TALLY, "for (; i > 0 && «s[i - 1] < score»; --i)", "s[i - 1] <= score")),
    _mutant("look_bound", "statistics: a key that was among the best of its row when sixteen began stays among them",
            (TALLY, "if («s[j * Z * W + r] > least[r]») insert(", "true")),
    _mutant("look_tile", "statistics: a tile takes over the best keys of the one before",
            (OBSERVE, "«marks.begin(rows.rows.count)»;",
             "rows.rows.index[0] > 0 ? void() : marks.begin(rows.rows.count)")),
    _mutant("look_share", "statistics: weights are not divided by their sum",
            (TALLY, "weight<Degree>(V::load(at), from[z], by) * «share[z]»;", "V::set1(1)")),
    _mutant("look_live", "statistics: rows that are NaN, or not there, add to columns",
            (TALLY, "choose(«static_cast<uint32_t>(live >> (z * W))», x, V::zero())", "~UINT32_C(0)")),
    _mutant("look_nan_keys", "statistics: a row that is NaN has best keys",
            (TALLY, "to_keys[i] = «is_nan(r)» ? -1", "false")),
    _mutant("look_state", "statistics: rows of the kernel for few rows keep its sums",
            (OBSERVE, "if (a_.state == nullptr || «u.cut.dots»)", "false")),
    _mutant("look_signed", "statistics: distances to later keys are negative",
            (TALLY, "fma(x, «absolute(from - V::set1(static_cast<E>(j)))», distance);",
             "from - V::set1(static_cast<E>(j))")),
    _mutant("look_positions", "statistics: distances are counted from a query's row",
            (TALLY, "static_cast<E>(«rows.position[r]» - key);", "rows.index[r]")),
    _mutant("look_column_bin", "statistics: a column of the map ends one key late, where keys divide evenly",
            (TALLY, "bin_end = «((bin + 1) * length + bins - 1) / bins»;", "(bin + 1) * length / bins + 1")),
    _mutant("look_row_bin", "statistics: a row of the map begins one query early",
            (OBSERVE, "to.map + «rows.rows.index[r] * bins / rows.sequence->q_count» * to.map_row;",
             "lower(bins - 1, (rows.rows.index[r] + 1) * bins / rows.sequence->q_count)")),
    _mutant("look_last_bin", "statistics: the last column of a map that a tile reaches is lost",
            (OBSERVE, "if (columns > 0) «marks.close_bin(rows.rows.count)»;", "void()")),
    _mutant("look_last_key", "statistics: the last key of sixteen receives nothing",
            (OBSERVE, "const int there = static_cast<int>(«lower(kGranule, keys - key)»);",
             "lower(kGranule - 1, keys - key)")),
    _mutant("look_heads", "statistics: heads of a tile add to the first one's columns",
            (TALLY, "if («mass[0] != mass[rows.count - 1]»)", "false")),
    _mutant("look_stripe_twice", "statistics: the first stripe counts twice",
            (OBSERVE, "for (int64_t n = «1»; n < u.stripes; ++n)", "int64_t(0)")),
    _mutant("look_stripe_lost", "statistics: the second stripe does not count",
            (OBSERVE, "for (int64_t n = 1; «n < u.stripes»; ++n)", "(n += n == 1) < u.stripes")),
    _mutant("look_stripe_kept", "statistics: a stripe's sums begin with what was there",
            (OBSERVE, "if («number > 0») std::memset(sums_", "false")),
)
# fmt: on


def set_mutant(module: ModuleType, number: int) -> None:
    """Switch one mistake of a mutated module on: its place in MUTANTS, from 1; 0 for none."""
    ctypes.c_int.in_dll(ctypes.CDLL(module.__file__), SWITCH).value = number


def _marked(text: str, edit: Edit) -> tuple[int, int]:
    """Where in the file's text the marked part of a place is. ValueError if the place is not there exactly once."""
    kept = [i for i, letter in enumerate(text) if not letter.isspace()]
    squeezed = "".join(text[i] for i in kept)
    place = "".join(edit.place.split())
    first, last = place.index("«"), place.index("»") - 1
    place = place.replace("«", "").replace("»", "")
    if (found := squeezed.count(place)) != 1:
        raise ValueError(f"csrc/{edit.file} holds {found} times, not once: {edit.place}")
    at = squeezed.index(place)
    if first == last:  # between two letters: after the one before, or before the one after
        begin = kept[at + first - 1] + 1 if first > 0 else kept[at]
        return begin, begin
    return kept[at + first], kept[at + last - 1] + 1


def mutated(csrc: Path) -> dict[str, str]:
    """The texts of the files that mutants change, all mutants in them. ValueError for a place that is not there."""
    edits: dict[str, list[tuple[int, int, str]]] = {}
    for number, mutant in enumerate(MUTANTS, 1):
        on = f"{SWITCH} == {number}"
        for edit in mutant.edits:
            text = (csrc / edit.file).read_text()
            begin, end = _marked(text, edit)
            new = (
                f"(({on}) ? ({edit.wrong}) : ({text[begin:end]}))" if end > begin else f" if ({on}) {{ {edit.wrong} }} "
            )
            edits.setdefault(edit.file, []).append((begin, end, new))
    found = {}
    for file, changes in edits.items():
        text, done = (csrc / file).read_text(), None
        for begin, end, new in sorted(changes, key=lambda change: change[:2], reverse=True):
            if done is not None and end > done:
                raise ValueError(f"csrc/{file}: two mutants change {text[begin:end]}")
            text, done = text[:begin] + new + text[end:], begin
        found[file] = f'extern "C" int {SWITCH};\n{text}'
    return found


def write(csrc: Path, to: Path) -> None:
    """Write the mutated copy of csrc. Files that are as they were keep their time."""
    texts = {str(path.relative_to(csrc)): path.read_text() for path in csrc.rglob("*") if path.is_file()}
    texts |= mutated(csrc)
    texts["dispatch.cpp"] += f'\nextern "C" {{ __attribute__((visibility("default"))) int {SWITCH} = 0; }}\n'
    for name, text in texts.items():
        path = to / name
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    for path in to.rglob("*"):
        if path.is_file() and str(path.relative_to(to)) not in texts:
            path.unlink()


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
