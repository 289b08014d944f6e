"""Memory for many rows: used again once nobody holds it, never before, and no more of it kept than is said."""

from __future__ import annotations

import threading

import torch

from moe.dispatch.pages import LARGE_PAGE, WORTH_BYTES, Shelf, room


def test_what_was_let_go_of_is_used_again_and_what_is_held_is_not() -> None:
    shelf = Shelf(kept_bytes=1 << 30)
    first = shelf.take(8 << 20)
    rows = first.view(torch.float32).view(-1, 64)[5:9].fill_(7.0)
    place = first.data_ptr()
    del first
    assert shelf.nbytes == 0 and shelf.take(8 << 20).data_ptr() != place and bool((rows == 7).all())
    shelf.clear()
    del rows
    assert shelf.nbytes >= 8 << 20
    assert shelf.take(7 << 20).data_ptr() == place  # nearly as large, so the same block
    assert shelf.take(1 << 20).data_ptr() != place  # most of it would lie idle


def test_no_more_is_kept_than_is_said() -> None:
    shelf = Shelf(kept_bytes=4 * LARGE_PAGE)
    held = [shelf.take(LARGE_PAGE) for _ in range(6)]
    del held
    assert shelf.nbytes == 4 * LARGE_PAGE
    large = shelf.take(8 * LARGE_PAGE)
    del large
    assert shelf.nbytes == 0


def test_gradients_hold_what_they_need() -> None:
    like = torch.ones(1, 256)
    x = room(like, WORTH_BYTES // 1024).fill_(3.0).requires_grad_()
    out = (x * x).sum()
    place = x.data_ptr()
    others = [room(like, WORTH_BYTES // 1024).fill_(0.0) for _ in range(3)]
    assert all(other.data_ptr() != place for other in others)
    del x
    (grad,) = torch.autograd.grad(out, out.grad_fn.next_functions[0][0].next_functions[0][0].variable)
    assert bool((grad == 6).all())


def test_threads_never_share_a_block() -> None:
    shelf, wrong = Shelf(kept_bytes=1 << 30), []

    def work(number: int) -> None:
        for turn in range(50):
            block = shelf.take(LARGE_PAGE - 64 * number).fill_(number)
            if not bool((block == number).all()):
                wrong.append((number, turn))
            del block

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and 1 <= shelf.nbytes // LARGE_PAGE <= 4
