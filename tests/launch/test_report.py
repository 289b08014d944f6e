"""Records of ranks become one report; the pictures and the page show what is in it."""

import dataclasses
import io
import json

import numpy as np
import pytest

from launch import plots, report
from launch.records import RankRecord, merge, pack_image, unpack_image, verified

KEYS = {
    *("version", "hardware", "ranks", "engine", "schedule", "frames", "tokens_before", "tokens_after", "text"),
    *("tokens_per_rank", "cache_bytes_per_rank", "peak_bytes_per_rank", "bytes_sent", "generated_ids", "seconds"),
    "verify",
}


def record(rank, world=3, **changes):
    values = {
        "rank": rank,
        "world": world,
        "host": "left" if rank < 2 else "right",
        "hardware": {"cpu": "some", "cores": 2, "memory_bytes": 2**30, "device": "cpu", "torch": "2", "python": "3"},
        "schedule": "ring",
        "frames": 8,
        "tokens_before": 2048,
        "tokens_after": 205,
        "tokens_local": 70 + rank,
        "cache_bytes": 1000 * (rank + 1),
        "peak_bytes": 2000 * (rank + 1),
        "stage_peak_bytes": {"encode": 5 + rank},
        "bytes_sent": {(rank + 1) % world: 10 + rank} if world > 1 else {},
        "generated_ids": [4, 5, 6],
        "text": "a hare",
        "seconds": {"encode": 1.0 + rank, "prefill": 3.0 - rank, "decode": 0.5, "first_token": 4.0},
        "events": [
            {"kind": "stage", "name": "prefill", "start": 1.0, "stop": 3.0},
            {"kind": "compute", "name": "step 0", "start": 1.0, "stop": 1.5},
            {"kind": "send", "name": "step 0", "start": 1.2, "stop": 1.2},
            {"kind": "wait", "name": "step 0", "start": 1.5, "stop": 2.0},
        ],
        "warnings": ["too long"],
        "notes": ["random projector"],
    }
    return RankRecord(**{**values, **changes})


def merged(records):
    return merge(records, engine="torchrun", config={}, seconds={"total": 9.0})


def test_merge_orders_ranks_and_keeps_every_number_of_each():
    result = merged([record(2), record(0), record(1)])
    assert result["tokens_per_rank"] == [70, 71, 72]
    assert result["cache_bytes_per_rank"] == [1000, 2000, 3000]
    assert result["peak_bytes_per_rank"] == [2000, 4000, 6000]
    assert result["bytes_sent"] == [[0, 10, 0], [0, 0, 11], [12, 0, 0]]
    assert result["seconds"] == {"encode": 3.0, "prefill": 3.0, "decode": 0.5, "first_token": 4.0, "total": 9.0}
    assert result["tokens_per_second"] == pytest.approx(2 / 0.5)
    assert [(m["host"], m["ranks"]) for m in result["hardware"]] == [("left", [0, 1]), ("right", [2])]
    assert (result["warnings"], result["notes"]) == (["too long"], ["random projector"])


def test_the_report_has_every_promised_key_and_is_json():
    result = merged([record(0, 1)])
    assert set(result) >= KEYS
    assert result["verify"] is None
    json.dumps(result, allow_nan=False)


def test_one_written_token_has_no_rate():
    assert merged([record(0, 1, generated_ids=[4])])["tokens_per_second"] is None


def test_a_record_survives_json():
    original = record(
        1, kept=[{"frame": 0, "seconds": 0.0, "grid": [2, 2], "cells": [1]}], verify={"same_tokens": True}
    )
    assert RankRecord.from_json(original.to_json()) == original


def test_a_comparison_that_gave_no_number_is_json_and_does_not_hold():
    verify = {"max_logit_diff": float("nan"), "tolerance": 2e-4, "same_tokens": True}
    result = merged([RankRecord.from_json(record(0, 1, verify=verify).to_json())])
    json.dumps(result, allow_nan=False)
    assert not verified(result)


@pytest.mark.parametrize(
    ("verify", "holds"),
    [
        (None, True),
        ({"max_logit_diff": 1e-4, "tolerance": 2e-4, "same_tokens": True}, True),
        ({"max_logit_diff": 3e-4, "tolerance": 2e-4, "same_tokens": True}, False),
        ({"max_logit_diff": 1e-4, "tolerance": 2e-4, "same_tokens": True, "all_within_tolerance": False}, False),
    ],
)
def test_a_comparison_holds_only_within_its_tolerance(verify, holds):
    assert verified({"verify": verify}) is holds


def test_merge_refuses_a_missing_rank_and_ranks_that_disagree():
    with pytest.raises(ValueError, match=r"missing ranks \[1\]"):
        merged([record(0), record(2)])
    with pytest.raises(ValueError, match="ranks 0 and 2 disagree about generated_ids"):
        merged([record(0), record(1), record(2, generated_ids=[4, 5, 7])])
    with pytest.raises(ValueError, match="no rank"):
        merged([])


def test_an_unknown_field_of_a_record_is_refused():
    with pytest.raises(ValueError, match="tokens_afer"):
        RankRecord.of({"tokens_afer": 3})
    assert RankRecord.of({"frames": 3}, rank=1).rank == 1


def test_the_page_shows_the_numbers_and_has_no_control_characters():
    verify = {"max_logit_diff": 3.25e-5, "tolerance": 2e-4, "same_tokens": True}
    result = merged([record(rank, verify=verify if rank == 0 else None) for rank in range(3)])
    text = report.as_text(result)
    for part in (
        "2,048",
        "205",
        "10.0% kept",
        "4.00 s to the first token, after loading",
        "cache (allocated)",
        "4.00 tokens per second",
        "3.25e-05",
        "a hare",
    ):
        assert part in text
    for part in ("too long", "random projector", "11 B", "5.9 KiB", "prefill"):
        assert part in text
    out = io.StringIO()
    report.show(result, out)
    assert out.getvalue() == text
    assert "\x1b" not in text


VERIFY = {
    "max_logit_diff": 5.65e-5,
    "tolerance": 2e-4,
    "same_tokens": True,
    "first_difference": None,
    "written_within_tolerance": True,
    "max_logit_diff_all": 3.1e-4,
    "sdpa_eager_diff_all": 3.6e-4,
    "tolerance_all": 7.2e-4,
    "all_within_tolerance": True,
}


def verify_lines(**changes):
    values = {name: value for name, value in {**VERIFY, **changes}.items() if value != "missing"}
    text = report.as_text(merged([record(0, 1, verify=values)]))
    block = text.partition("Compared with one rank and plain attention\n")[2].partition("\n\n")[0]
    return [line.strip() for line in block.splitlines()]


def test_a_comparison_is_told_in_sentences_with_what_was_allowed():
    everywhere = (
        "all positions of the prompt: at most 3.10e-04 apart; sdpa and eager alone differ by 3.60e-04, "
        "allowed is 7.20e-04: holds"
    )
    written = "written tokens: logits differ by at most 5.65e-05 (tolerance 2.00e-04): holds"
    assert verify_lines() == [written, "the same tokens as one rank", everywhere]
    first = {"position": 2, "token": 7, "alone": 9, "gap": 1e-4}
    excused = verify_lines(same_tokens=False, first_difference=first)
    assert excused[1].startswith("first difference at written token 3: 7 here, 9 on one rank; gap")
    assert excused[1].endswith("1.00e-04, below the tolerance: holds")
    far = {**first, "gap": 0.5}
    refused = verify_lines(same_tokens=False, first_difference=far, written_within_tolerance=False)
    assert refused[1].endswith("5.00e-01, not below the tolerance: DOES NOT HOLD")
    assert verify_lines(max_logit_diff="nan")[0].endswith("nan (tolerance 2.00e-04): DOES NOT HOLD")
    assert verify_lines(all_within_tolerance=False)[2].endswith("7.20e-04: DOES NOT HOLD")


def test_a_comparison_of_another_entry_is_told_as_far_as_it_goes():
    few = dict.fromkeys(
        [name for name in VERIFY if name not in ("max_logit_diff", "tolerance", "same_tokens")], "missing"
    )
    assert len(verify_lines(**few)) == 2
    assert verify_lines(**few, same_tokens=False)[1] == "not the same tokens as one rank"
    assert verify_lines(**few, rows_compared=5)[2] == "rows compared: 5"


def test_stages_have_one_order_whichever_rank_came_to_them_first():
    idle = {"load": 1.0, "prefill": 1.0, "decode": 1.0, "own": 1.0}
    busy = {"load": 1.0, "encode": 2.0, "read": 2.0, "reduce": 2.0, "prefill": 1.0, "decode": 1.0, "first_token": 1.0}
    result = merged([record(0, 2, seconds=idle), record(1, 2, seconds=busy)])
    names = ["load", "read", "encode", "reduce", "prefill", "decode"]
    assert list(result["seconds"]) == [*names, "own", "first_token", "total"]
    shown = [row[0] for block in report.blocks(result) if block.title == "Stages" for row in block.rows]
    assert shown == [*names, "own"]


def test_a_terminal_gets_tables():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    report.show(merged([record(rank, text="[bold]not markup[/bold]") for rank in range(3)]), out)
    assert "Bytes per link" in out.getvalue()
    assert "[bold]not markup[/bold]" in out.getvalue()


def test_a_large_world_is_not_printed_link_by_link():
    text = report.as_text(merged([record(rank, 13) for rank in range(13)]))
    assert "13 x 13 links" in text


def test_a_picture_survives_packing_and_is_averaged_down():
    image = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)
    assert (unpack_image(pack_image(image)) == image).all()
    assert unpack_image(pack_image(np.full((100, 50, 3), 9, np.uint8), longest=30)).shape == (25, 12, 3)


def test_pictures_are_written_and_dim_exactly_the_dropped_cells(tmp_path):
    frame = np.full((40, 80, 3), 200, np.uint8)
    sample = {"frame": 3, "seconds": 1.5, "grid": [2, 4], "cells": [0, 7], "image": pack_image(frame)}
    shown = plots._picture(sample)
    bright = (shown > 0.7).all(axis=2)
    height, width = bright.shape
    assert bright[: height // 2, : width // 4].all()
    assert bright[height // 2 :, 3 * width // 4 :].all()
    assert bright.mean() == pytest.approx(2 / 8)
    records = [record(rank, kept=[{**sample, "frame": rank}]) for rank in range(3)]
    assert plots.write(tmp_path, records) is None
    for name in (plots.KEPT_PNG, plots.TIMELINE_PNG):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / name).stat().st_size > 5000


def test_a_run_without_samples_or_events_draws_nothing(tmp_path):
    assert plots.write(tmp_path, [record(0, 1, events=[], kept=[])]) is None
    assert list(tmp_path.iterdir()) == []


def test_the_prefill_window_is_that_stage_on_all_ranks():
    late = dataclasses.replace(record(1), events=[{"kind": "stage", "name": "prefill", "start": 2.0, "stop": 3.5}])
    assert plots.prefill_window([record(0), late]) == (1.0, 3.5)
    assert plots.prefill_window([late]) is None
