"""Around a call on a view: its plan, torch.compile, inference mode, and what a prepared call may remember."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch

import qkv
from qkv.call.keys import Clock, KVLayout, KVView
from tests.kit import backends, private, views
from tests.kit.bits import differ
from tests.kit.view_variants import run
from tests.kit.views import ViewConfig

pytestmark = pytest.mark.usefixtures("one_thread", "nothing_kept")
NATIVE = any(name.startswith("cpu") for name in backends.promising())
CAUSAL = qkv.causal()


def step(lengths: Any, T: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, KVView]:
    """Queries, and a view of sequences on pages of 16, all of one pool; other lengths are another step of the same."""
    torch.manual_seed(seed)
    k, v = torch.randn(2, 40, 2, 16, 24).to(dtype)
    pages, starts = array("i"), array("q", [0])
    for length in lengths:
        pages.extend((7 * len(pages) + m * 3 + seed) % 40 for m in range(-(-length // 16)))
        starts.append(len(pages))
    layout = KVLayout(pages, starts, array("q", lengths), None, Clock())
    return torch.randn(len(lengths), 4, T, 24).to(dtype), KVView(k, v, None, None, dtype, layout, None)


def truth(q: torch.Tensor, view: KVView, mask: Any = CAUSAL, **options: Any) -> torch.Tensor:
    """A sequence at a time, on keys put in order, by the definition in float64."""
    layout, rows = view.layout, []
    for i, length in enumerate(layout.lengths):
        table = layout.tables[layout.starts[i] : layout.starts[i + 1]]
        k, v = (torch.stack([x[table[j // 16], :, j % 16] for j in range(length)], 1)[None].double() for x in view[:2])
        own = mask[i] if isinstance(mask, list) else mask
        options |= {"positions": "end", "backend": "reference"}
        rows.append(qkv.attention(q[i : i + 1].double(), k, v, mask=own, **options))
    return torch.cat(rows)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got.double() - want).abs().max() < 2e-6 * (1 + want.abs().max())


# ------------------------------------------------------------------------------------------------------------ plan
class TestPlan:
    def test_says_what_will_run(self) -> None:
        q, view = step((100, 33), T=2)
        plan = qkv.plan(q, view, mask=CAUSAL)
        text = str(plan)
        assert plan.backend == ("cpu" if NATIVE else "tiled")
        assert "float32 on pages of 16" in text
        assert ("read where they lie" in text) == NATIVE
        assert (plan.problem.Lq, plan.problem.Lk, plan.problem.B) == (2, 100, 2)
        again = qkv.plan(*step((100, 33), T=2), mask=CAUSAL)
        assert (plan, hash(plan)) == (again, hash(again))
        assert plan != qkv.plan(*step((101, 33), T=2), mask=CAUSAL)
        assert plan.flops > 0

    def test_says_what_is_copied(self) -> None:
        q, view = step((100, 33))
        plan = qkv.plan(q, view, mask=qkv.mask_mod(lambda b, h, p, j: j <= p))
        assert plan.backend == "tiled"
        assert "copied first" in str(plan)
        assert "read where they lie" not in str(plan)

    @pytest.mark.parametrize("storage", ["int8", "f8"])
    def test_says_how_keys_are_stored(self, storage: str) -> None:
        inputs = views.materialise(ViewConfig(storage=storage, dtype="bf16", P=24))
        text = str(qkv.plan(**inputs.call()))
        assert f"keys in {str(views.STORED[storage]).removeprefix('torch.')} on pages of 24" in text

    def test_held_and_ragged(self) -> None:
        inputs = views.materialise(
            ViewConfig(lengths=(50, 20), queries=(3, 0), ragged=True, held=("window", 9, None), mask=None)
        )
        plan = qkv.plan(**inputs.call())
        assert "window(9, None)" in str(plan)
        assert plan.problem.Lq == 3

    def test_reads_no_data(self) -> None:
        q, view = step((100, 33))
        qkv.plan(q * torch.nan, view._replace(k=view.k * torch.nan), mask=CAUSAL)

    def test_a_named_backend(self) -> None:
        q, view = step((30,))
        assert qkv.plan(q, view, backend="reference").backend == "reference"
        with pytest.raises(qkv.UnsupportedError):
            qkv.plan(q, view, mask=qkv.mask_mod(lambda b, h, p, j: j <= p), backend="cpu")


# ---------------------------------------------------------------------------------------------- compile, inference
class TestModes:
    def test_compile(self) -> None:
        """attention on a view breaks the graph; what is around it is compiled, and the result is right."""
        counts: list[int] = []

        def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
            counts.append(len(graph.graph.nodes))
            return graph.forward

        def layer(q: torch.Tensor, view: KVView) -> torch.Tensor:
            return qkv.attention(q * 2, view, mask=CAUSAL) + 1

        torch._dynamo.reset()
        compiled = torch.compile(layer, backend=backend)
        for lengths in ((100, 33), (101, 34), (600, 5)):
            q, view = step(lengths)
            assert torch.equal(compiled(q, view), layer(q, view))
            close(compiled(q, view) - 1, truth(q * 2, view))
        assert counts, "nothing was compiled"
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"(?i)graph break|disable|unsupported|skip"):
            torch.compile(layer, backend=backend, fullgraph=True)(*step((100, 33)))
        torch._dynamo.reset()

    def test_inference_mode(self) -> None:
        q, view = step((100, 33))
        outside = qkv.attention(q, view, mask=CAUSAL)
        with torch.inference_mode():
            inside = qkv.attention(q, view, mask=CAUSAL)
            q2, view2 = step((100, 33))  # of tensors that were made inside
            again, lse = qkv.attention(q2, view2, mask=CAUSAL, return_lse=True)
        assert inside.is_inference()
        assert not outside.is_inference()
        assert torch.equal(outside, inside)
        assert torch.equal(outside, again)
        assert lse.shape == (2, 4, 1)

    def test_autocast_and_default_dtype_change_nothing(self) -> None:
        q, view = step((100, 33))
        want = qkv.attention(q, view, mask=CAUSAL)
        for mask in (CAUSAL, qkv.mask_mod(lambda b, h, p, j: j <= p)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = qkv.attention(q, view, mask=mask)
            assert out.dtype == torch.float32
            close(out, want.double())

    def test_an_expanded_or_negated_query(self) -> None:
        q, view = step((100, 33), T=2)
        close(qkv.attention(q[:1].expand(2, -1, -1, -1), view, mask=CAUSAL), truth(q[:1].expand(2, -1, -1, -1), view))
        negated = torch.complex(torch.zeros_like(q), q).conj().imag
        assert negated.is_neg()
        for _ in range(2):
            close(qkv.attention(negated, view, mask=CAUSAL), truth(-q, view))

    def test_no_sequences_and_no_rows(self) -> None:
        q, view = step(())
        assert qkv.attention(q, view, mask=CAUSAL).shape == (0, 4, 1, 24)
        q, view = step((5, 0), T=0)
        out, lse = qkv.attention(q, view, mask=CAUSAL, return_lse=True)
        assert (out.shape, lse.shape) == ((2, 4, 0, 24), (2, 4, 0))


# ------------------------------------------------------------------------------------------------------- remembered
class TestPrepared:
    def test_other_lengths_and_pages_are_the_same_call(self) -> None:
        """A step of decode prepares once, and every answer is right."""
        for n, lengths in enumerate([(100, 33), (101, 34), (600, 1), (17, 640), (1, 1)]):
            q, view = step(lengths, seed=n)
            close(qkv.attention(q, view, mask=CAUSAL), truth(q, view))
            assert len(private.ready_views()) == NATIVE

    @pytest.mark.parametrize(
        "others",
        [
            [{"mask": qkv.sliding_window(5)}, {"mask": None}, {"mask": qkv.sliding_window(6)}],
            [{"scale": 0.5}, {"scale": -0.5}, {"scale": 1}],
            [{"softcap": 2.0}, {"softcap": 3.0}],
            [{"bias": qkv.alibi(torch.tensor([0.5, 0.25, 0.1, 1.0]))}, {"bias": qkv.alibi(torch.ones(4))}],
            [{"sinks": torch.tensor([1.0, 2.0, -1.0, 3.0])}, {"sinks": torch.arange(8.0)[::2]}],
            [{"sinks": torch.tensor([1.0, 2.0, -1.0, 3.0], dtype=torch.float64)}, {"sinks": torch.zeros(4)}],
        ],
        ids=lambda x: next(iter(x[0])),
    )
    def test_other_options_are_other_calls(self, others: list[dict[str, Any]]) -> None:
        q, view = step((100, 33), T=3)
        for options in ({}, *others, {}, *others):
            given = {"mask": CAUSAL} | options
            close(qkv.attention(q, view, **given), truth(q, view, **given))

    def test_true_is_no_number(self) -> None:
        """True equals 1.0 as a key of a table, and is an error as a scale."""
        q, view = step((100, 33))
        qkv.attention(q, view, mask=CAUSAL, scale=1.0, softcap=1.0)
        for wrong in ({"scale": True}, {"softcap": True}):
            with pytest.raises(qkv.ArgumentTypeError):
                qkv.attention(q, view, mask=CAUSAL, **{"scale": 1.0, "softcap": 1.0} | wrong)

    def test_held_is_part_of_it(self) -> None:
        q, view = step((100, 33), T=3)
        for held in (None, qkv.window(4, None), None, qkv.window(20, None)):
            mask = CAUSAL if held is None else CAUSAL & held
            close(qkv.attention(q, view._replace(held=held), mask=CAUSAL), truth(q, view, mask))

    def test_strides_are_part_of_it(self) -> None:
        q, view = step((100, 33), T=3)
        want = truth(q, view)
        for swap in ((1, 2), (0, 1), (2, 3)):
            moved = [x.transpose(*swap).contiguous().transpose(*swap) for x in view[:2]]
            for k, v in ((moved[0], view.v), (view.k, moved[1]), moved):
                close(qkv.attention(q, view._replace(k=k, v=v), mask=CAUSAL), want)
            close(qkv.attention(q.transpose(*swap).contiguous().transpose(*swap), view, mask=CAUSAL), want)

    def test_scales_are_part_of_it(self) -> None:
        """int8 with scales in two orders in memory, and another pool of the same shapes."""
        inputs = views.materialise(ViewConfig(seed=5, storage="int8", Hkv=2, poison="zero"))
        view, want = inputs.view, run(inputs, None)
        assert view.k_scale is not None
        assert view.v_scale is not None
        plain = [x.contiguous() for x in (view.k_scale, view.v_scale)]
        turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in plain]
        assert plain[0].stride() != turned[0].stride()
        for k_scale, v_scale in (plain, turned, plain):
            found = run(inputs, None, k=view._replace(k_scale=k_scale, v_scale=v_scale))
            assert not differ(want, found)
        double = run(inputs, None, k=view._replace(v_scale=view.v_scale * 2))
        assert torch.equal(double["out"], want["out"] * 2)

    def test_data_is_read_anew(self) -> None:
        """New keys in the same memory, new queries, new sinks."""
        q, view = step((100, 33))
        sinks = torch.zeros(4)
        for n in range(3):
            close(qkv.attention(q, view, mask=CAUSAL, sinks=sinks), truth(q, view, sinks=sinks))
            view.k.mul_(1.5)
            view.v[n].neg_()
            q, sinks = q + 0.1, sinks + 1.0

    def test_a_dense_mask_that_was_changed(self) -> None:
        """As a tensor it is read at each call; as a mask that holds it, its change is an error."""
        q, view = step((40, 40), T=2)
        seen = torch.rand(2, 40) < 0.5
        for _ in range(3):
            close(qkv.attention(q, view, mask=seen), truth(q, view, seen.clone()))
            seen.logical_not_()
        mask = qkv.dense(seen)
        close(qkv.attention(q, view, mask=mask), truth(q, view, seen.clone()))
        seen[0, 0].logical_not_()
        with pytest.raises(qkv.ArgumentError, match="dense"):
            qkv.attention(q, view, mask=mask)

    def test_a_bias_that_was_changed(self) -> None:
        q, view = step((40, 40), T=2)
        bias = torch.randn(4, 2, 40)
        for _ in range(3):
            close(qkv.attention(q, view, mask=CAUSAL, bias=bias), truth(q, view, bias=bias.clone()))
            bias.mul_(-1.5)

    def test_masks_that_hold_numbers(self) -> None:
        """Equal masks are the same call, others are not; a mask keeps the numbers it was made of."""
        q, view = step((100, 33), T=2)
        numbers = torch.tensor([3, 30])
        mask = qkv.prefix(numbers)
        for expected in ([3, 30], [3, 30], [5, 7]):
            if expected == [5, 7]:
                close(qkv.attention(q, view, mask=mask), truth(q, view, [qkv.prefix(3), qkv.prefix(30)]))
                numbers.copy_(torch.tensor(expected))
            own = qkv.prefix(numbers)
            close(qkv.attention(q, view, mask=own), truth(q, view, [qkv.prefix(x) for x in expected]))

    def test_what_is_remembered_is_bounded(self) -> None:
        q, view = step((20,))
        for n in range(private.ready().most + 20):
            qkv.attention(q, view, mask=CAUSAL, scale=0.1 + n)
        assert len(private.ready()) <= private.ready().most
        close(qkv.attention(q, view, mask=CAUSAL, scale=0.1), truth(q, view, scale=0.1))

    def test_lse_or_not(self) -> None:
        q, view = step((700, 33))
        for _ in range(2):
            alone = qkv.attention(q, view, mask=CAUSAL)
            out, lse = qkv.attention(q, view, mask=CAUSAL, return_lse=True)
            assert torch.equal(alone, out)
            assert lse.isfinite().all()

    def test_ragged_and_not(self) -> None:
        """The same q for one sequence, as a row and packed."""
        q, view = step((100,), T=3)
        layout = view.layout
        packed = KVLayout(layout.tables, layout.starts, layout.lengths, array("q", [3]), Clock())
        for own in (view, view._replace(layout=packed), view):
            close(qkv.attention(q, own, mask=CAUSAL), truth(q, view))


def test_the_fixture_counts_what_a_cache_would_give() -> None:
    """`step` and `truth` are no echo of each other: a page taken for another is seen."""
    q, view = step((100, 33))
    other = KVLayout(view.layout.tables[::-1], view.layout.starts, view.layout.lengths, None, Clock())
    assert (qkv.attention(q, view._replace(layout=other), mask=CAUSAL) - truth(q, view)).abs().max() > 0.1
