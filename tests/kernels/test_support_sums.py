"""What sparse steps left out, summed up on the device, against the float64 reference and sums by hand."""

import math

import pytest
import torch

from vashista.kernels.requirements import KernelInputError
from vashista.kernels.support_sums import NUM_SUMS, report_size, sum_support, sum_support_reference


def draw(device, num_layers=3, lens=(700, 1, 0, 96, 4096), num_kv_heads=2, group=4):
    """Some head-steps drop something, some attend to everything; layers have windows or none."""
    torch.manual_seed(5)
    num_requests = len(lens)
    num_pairs = num_requests * num_kv_heads
    lse = torch.randn(num_layers, num_requests, num_kv_heads * group) * 3 + 9
    mass = torch.randn(num_layers, num_pairs, 4) * 3 + 7
    kept = torch.randint(0, 8, (num_layers, num_pairs)) * torch.randint(0, 2, (num_layers, num_pairs))
    windows = torch.tensor([(None, 300, 16)[layer % 3] or 0 for layer in range(num_layers)])
    lens = torch.tensor(lens)
    lse[:, lens == 0] = -math.inf
    return [x.to(device) for x in (lse, mass, kept.int(), lens.int(), windows.int())]


def report_of(parts, **options):
    """The kernel's, into poison."""
    lse, _, num_kept = parts[:3]
    num_kv_heads = num_kept.shape[1] // max(lse.shape[1], 1)
    size = lse.shape[1], report_size(lse.shape[0], num_kv_heads)
    report = torch.full(size, -7.0, dtype=torch.float64, device=lse.device)
    sum_support(*parts, report, **options)
    return report


@pytest.mark.parametrize("has_estimate", [True, False])
@pytest.mark.parametrize(
    "shape", [{}, {"num_layers": 80, "num_kv_heads": 8, "group": 1}, {"num_layers": 1, "num_kv_heads": 1, "group": 3}]
)
def test_a_report_is_the_references(device, shape, has_estimate):
    parts = draw(device, **shape)
    expected = sum_support_reference(*parts, has_estimate=has_estimate)
    torch.testing.assert_close(
        report_of(parts, has_estimate=has_estimate), expected, rtol=1e-5, atol=1e-6, equal_nan=True
    )
    assert 0 < expected[:, 0].sum() < parts[2].numel(), "some drop something"


def test_sums_by_hand(device):
    """Two layers, the second with a window, two KV heads of two query heads; 100 tokens, so that 12 of a group lack."""
    lse = torch.tensor([[[5.0, 4.0, 5.0, 4.0]], [[1.0, 2.0, 3.0, 3.0]]], device=device)
    mass = torch.tensor([[9.0, 3.0, 2.0, 6.0]], device=device).expand(2, 2, 4).contiguous()
    kept = torch.tensor([[2, 7], [0, 1]], dtype=torch.int32, device=device)
    windows = torch.tensor([0, 40], dtype=torch.int32, device=device)
    context_lens = torch.tensor([100], dtype=torch.int32, device=device)
    report = report_of([lse, mass, kept, context_lens, windows])[0].tolist()

    def share(kept, dropped):
        return 1 / (1 + math.exp(kept - dropped))

    estimates = [share(5, 3), 0.0, 0.0, share(3, 3)]  # of the best head of a group
    gaps = [4 - 2 + math.log(16), 3 - 2 + math.log(16)]
    sums = [2, (32 - 12) + 100 + 40 + (16 - 12), 100 + 100 + 40 + 40, share(4, 6) + share(3, 6), sum(estimates)]
    assert report == pytest.approx([*sums, sum(gaps), *estimates], rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", [0, 1])
def test_what_is_no_number_is_counted_as_the_reference_counts_it(device, part, bad):
    parts = draw(device, lens=(700, 900))
    parts[2].fill_(2)
    for place in range(4):
        changed = [x.clone() for x in parts]
        changed[part][1, 0, place] = bad
        expected = sum_support_reference(*changed)
        assert expected[0, 3].isfinite(), "a bound is never unknown, but 1"
        torch.testing.assert_close(report_of(changed), expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("log", "wanted"), [(9.0, (0, 0, 0)), (-math.inf, (0, 0, 0)), (math.nan, (1, None, None))])
def test_a_head_that_dropped_nothing_says_so_unless_its_mass_is_no_number(device, log, wanted):
    parts = draw(device, num_layers=1, lens=(700,), num_kv_heads=1)
    parts[0].fill_(log)
    parts[1].fill_(-math.inf)
    parts[2].fill_(2)
    report = report_of(parts)
    torch.testing.assert_close(report, sum_support_reference(*parts), equal_nan=True)
    assert [None if math.isnan(x) else x for x in report[0, 3:6].tolist()] == list(wanted)


def test_a_step_without_requests_is_nothing(device):
    parts = draw(device, lens=())
    assert report_of(parts).shape == (0, NUM_SUMS)


def test_tensors_that_do_not_fit_are_refused(device):
    parts = draw(device)
    report = torch.empty(5, report_size(3, 2), dtype=torch.float64, device=device)
    for place, wrong in (
        (0, parts[0][:, :, :3]),
        (0, parts[0].half()),
        (1, parts[1][..., :3]),
        (2, parts[2][:, :3]),
        (2, parts[2].long()),
        (3, parts[3][:2]),
        (4, parts[4].long()),
    ):
        with pytest.raises(KernelInputError):
            sum_support(*[wrong if index == place else part for index, part in enumerate(parts)], report)
    for wrong in (report[:, 1:], report.float(), report[:, :-1].contiguous()):
        with pytest.raises(KernelInputError):
            sum_support(*parts, wrong)
