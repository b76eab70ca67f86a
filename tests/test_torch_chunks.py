"""Copies beside steps: their order, whatever is late, and on a GPU."""

from __future__ import annotations

import pytest
from fake_copies import LateCopies
from offloads import LATE, assert_equal, give, make, master_dtype, masters_of

torch = pytest.importorskip("torch")

from fastadam.torch import FusedAdam, OffloadedAdam, chunks, offload  # noqa: E402


@pytest.fixture(params=LATE, ids="late={0}".format)
def copies(request, monkeypatch):
    fake = LateCopies(request.param)
    monkeypatch.setattr(offload, "copies_for", lambda _: fake)
    return fake


def test_copies_run_beside_steps():
    fake = LateCopies()
    params = make(torch.bfloat16, [(250,), (150,)])
    opt = OffloadedAdam(params, chunk=100)
    opt._copies[params[0].device] = fake
    give(params, masters_of(params))
    opt.step()
    fetch, send, fetched, sent = ("fetch", 100), ("send", 100), ("wait", "fetch"), ("wait", "send")
    assert fake.log == [
        *("begin", fetch, fetch, fetched, send),  # the second comes while the first is stepped
        *(fetch, fetched, send),
        *(fetch, fetched, sent, send),  # the copy of the first must have gone
        *(fetched, sent, send, "end"),
    ]
    # Two chunks of gradients, and of copies, however large the parameters; a bundle starts at a line.
    assert len(fake.bytes_of_empty) == 4
    assert max(fake.bytes_of_empty) <= 100 * 2 + 2 * 64
    assert fake.done == {
        "fetch": 5,
        "send": 2,
    }  # with one entry of begin: the last two are still on their way
    fake.synchronize()
    assert_equal(params, [opt.state[p]["master_param"] for p in params])


def test_chunks_are_of_one_kind_and_size():
    assert chunks.cut([5, 3, 0, 4], ["a", "b", "a", "a"], 4) == [
        [(0, 0, 4)],
        [(0, 4, 5), (3, 0, 3)],
        [(3, 3, 4)],
        [(1, 0, 3)],
    ]


def test_large_chunks_are_stepped_by_all_threads():
    params = make(torch.bfloat16, [(2**16 + 5,), (70_000,)])
    masters = masters_of(params)
    ours, theirs = OffloadedAdam(params, chunk=2**16), FusedAdam(masters)
    for _ in range(2):
        give(params, masters)
        ours.step()
        theirs.step()
    assert_equal(params, masters)


def test_float32_needs_no_second_copy_on_the_way():
    fake = LateCopies()
    params = make(torch.float32, [(100,)])
    opt = OffloadedAdam(params)
    opt._copies[params[0].device] = fake
    give(params, masters_of(params))
    opt.step()
    assert sorted(fake.bytes_of_empty) == [0, 400, 400 + 48]  # the master itself is pinned


def test_a_step_that_is_interrupted_is_whole(copies, monkeypatch):
    params = make(torch.bfloat16)
    masters = masters_of(params)
    ours, theirs = OffloadedAdam(params, chunk=64), FusedAdam(masters)
    plan, calls = chunks.Bundle.plan, []

    def interrupted(*arguments):
        call = plan(*arguments)

        def and_raise():
            call()
            calls.append(call)
            if len(calls) == 3:
                raise KeyboardInterrupt

        return and_raise

    monkeypatch.setattr(chunks.Bundle, "plan", interrupted)
    give(params, masters)
    with pytest.raises(KeyboardInterrupt):
        ours.step()
    assert len(calls) > 3
    monkeypatch.undo()
    theirs.step()
    copies.synchronize()
    assert_equal(params, masters)
    assert ours.state[params[0]]["step"] == 1


class WithoutStreams(LateCopies):
    """Steps that do not know of each other: each on a stream of its own."""

    def begin(self):
        pass


def test_a_step_waits_for_copies_of_the_one_before():
    fake = WithoutStreams()
    params = make(torch.float32, [(250,)])
    masters = masters_of(params)
    ours, theirs = OffloadedAdam(params, chunk=100), FusedAdam(masters)
    ours._copies[params[0].device] = fake
    for k in range(3):
        give(params, masters)
        asked = len(fake.log)
        ours.step()
        waits = [("wait", "send")] * 3 if k else [("fetch", 100)]
        assert fake.log[asked:][: len(waits)] == waits
        theirs.step()
    fake.synchronize()
    assert_equal(params, masters)


@pytest.mark.gpu
@pytest.mark.parametrize("own_stream", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda(dtype, own_stream):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    shapes = [(1000, 1000), (7,), (2**20 + 3,), ()]
    params = [param.detach().cuda().requires_grad_() for param in make(dtype, shapes)]
    masters = [param.detach().to(master_dtype(param)).cpu().requires_grad_() for param in params]
    ours, theirs = OffloadedAdam(params, chunk=2**18), FusedAdam(masters)
    before = torch.cuda.memory_allocated()
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(5):
            busy = torch.randn(4000, 4000, device="cuda")
            late = 0 * (busy @ busy @ busy)[0, 0].to(dtype)  # gradients are not there at once
            for param in params:
                param.grad = torch.randn(param.shape, device="cuda", dtype=dtype) + late
            ours.step()
            seen = [param.detach() + 0 for param in params]  # what comes after a step finds it done
            for param, master in zip(params, masters, strict=True):
                master.grad = param.grad.cpu().to(master.dtype)
                param.grad = None
            theirs.step()
            assert_equal([each.cpu() for each in seen], masters)
    assert all(state["exp_avg"].device.type == "cpu" for state in ours.state.values())
    del seen, busy, late
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < sum(p.numel() * p.itemsize for p in params)
    again = OffloadedAdam(params)
    again.load_state_dict(ours.state_dict())
    assert all(value.device.type == "cpu" for state in again.state.values() for value in state.values())
