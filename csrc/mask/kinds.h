// The kinds of masks, one a line: the opcodes (MaskOp), the lengths of instructions (words.h) and what a program is
// checked for (validate.cpp) are made of this table. What a kind shows stands in atoms.h; how it is lowered, in the
// class in Python.
//
//   KIND(name, opcode, words, related, held)
//     words    what each word after the opcode may be, as in `Word` (words.h); operands are named by index
//     related  what the words w[1], w[2], ... have to be together
//     held     whether the operands hold all that a call may read of them
//
// A program is in postfix order: leaves push one truth value for (b, h, i, p, j), And, Or and Not combine what is on
// the stack.
//
//   Window     left right                   p - left <= j <= p + right; -1: unbounded
//   Prefix     n operand                    j < n; or operand -1 is none, else int64 (B,) or (1,) that replaces n
//   Padding    operand side                 int64 (B,) or (1,) lengths; side 0: right, 1: left
//   Documents  by_index contiguous lo hi    lo, hi: int64 (q_rows, q_len), the range of all keys of the query's
//              q_rows q_len qid kid k_rows  document; unless contiguous, ids qid, kid: int64, must be equal and >= 0
//   Chunked    n
//   Strided    n offset
//   Dilated    window step
//   Global     operand                      sorted unique int64
//   Random     per_row block seed
//   Blocks     operand rows_b rows_h nq     uint8 (rows_b, rows_h, nq, nk)
//              nk block
//   PerHead    Hq                           and after it Hq times: the length of a program, the program
//   Dense      operand stride_b stride_h    uint8; strides in elements, 0 where broadcast
//              stride_i stride_j
//   Selected   operand wide rows_b heads    int32, or int64 where wide, (rows_b, heads, rows, n): ascending blocks of
//              rows n block queries         keys; heads divides Hq, and `queries` queries share a row
//   Portion    first_key first_query Lq Lk  and after it the length of a program and the program: of a call of so many
//                                           queries and keys, of which this call is a part; p counts from first_key
#pragma once

// clang-format off
#define QKV_MASK_KINDS(KIND) \
    KIND(All, 0, (), true, true) \
    KIND(Window, 1, (number, number), true, true) \
    KIND(Prefix, 2, (number, optional), true, w[2] < 0 || rows(count(w[2]), batches)) \
    KIND(Padding, 3, (operand, any), true, rows(count(w[1]), batches)) \
    KIND(Documents, 4, (any, any, operand, operand, size, size, any, any, any), \
         w[2] || (named(w[7]) && named(w[8]) && in(size, w[9])), \
         rows(w[5], batches) && holds(count(w[3]), w[5], w[6]) && holds(count(w[4]), w[5], w[6]) && \
             (w[2] || (rows(w[9], batches) && holds(count(w[7]), w[5], w[6]) && holds(count(w[8]), w[9], keys)))) \
    KIND(Chunked, 5, (positive), true, true) \
    KIND(Strided, 6, (positive, number), true, true) \
    KIND(Dilated, 7, (size, positive), product(w[1], w[2]), true) \
    KIND(Global, 8, (operand), true, true) \
    KIND(Random, 9, (draws, positive, any), true, true) \
    KIND(Blocks, 10, (operand, size, size, size, size, positive), product(w[5], w[6]), \
         rows(w[2], batches) && rows(w[3], a.Hq) && holds(count(w[1]), w[2], w[3], w[4], w[5])) \
    KIND(PerHead, 11, (size), true, w[1] == a.Hq) \
    KIND(Dense, 12, (operand, size, size, size, size), true, spans(count(w[1]), w + 2)) \
    KIND(And, 13, (), true, true) \
    KIND(Or, 14, (), true, true) \
    KIND(Not, 15, (), true, true) \
    KIND(Selected, 16, (operand, any, size, positive, size, size, positive, positive), product(w[5], w[8]), \
         rows(w[3], batches) && a.Hq % w[4] == 0 && (queries == 0 || (queries - 1) / w[8] < w[5]) && \
             holds(count(w[1]), w[3], w[4], w[5], w[6])) \
    KIND(Portion, 17, (size, size, size, size), true, w[1] + keys <= w[4] && w[2] + queries <= w[3])
// clang-format on
