"""Tables on the device, and what the host knows of timesteps there."""

import numpy as np
import pytest
import torch

from improved_diffusion.process import create_gaussian_diffusion
from improved_diffusion.tables import look_up, mapped, on_host, read_only, remember, scaled


def noted(values, dtype=torch.int64):
    return remember(torch.tensor(values, dtype=dtype), np.array(values, dtype=np.float64))


def unreadable(t):
    """Whether the host knows nothing of a tensor but by reading it."""
    return not hasattr(t, "_values_on_host")


@pytest.mark.parametrize("respacing", ["", "ddim10"])
@pytest.mark.parametrize("rescale", [False, True])
def test_what_is_noted_is_what_the_tensor_holds(respacing, rescale):
    """To the bit: whoever has no note reads the same."""
    seen = []

    def model(x, t):
        seen.append((on_host(t), t.double().numpy(), unreadable(t)))
        return torch.zeros_like(x)

    diffusion = create_gaussian_diffusion(
        steps=70, timestep_respacing=respacing, rescale_timesteps=rescale
    )
    diffusion.p_sample_loop(model, (2, 1, 2, 2), device="cpu")
    assert len(seen) == diffusion.num_timesteps
    for note, values, unknown in seen:
        assert not unknown
        assert np.array_equal(np.broadcast_to(note, 2), values)


def test_a_note_ends_when_the_tensor_changes():
    t = noted([3, 5])
    t += 1
    assert on_host(t).tolist() == [4, 6]
    assert on_host(scaled(t, 0.5)).tolist() == [2, 3]


def test_notes_go_on_to_what_is_made_of_timesteps():
    t = noted([1, 2])
    assert on_host(scaled(t, 0.1)).tolist() == scaled(t, 0.1).double().tolist()
    table = read_only(np.array([7, 8, 9]))
    assert on_host(mapped(t, table)).tolist() == mapped(t, table).tolist() == [8, 9]
    assert unreadable(scaled(torch.tensor([1, 2]), 0.1))


def test_inference_tensors_carry_no_note():
    with torch.inference_mode():
        t = noted([3, 5])
        t += 1
        assert on_host(t).tolist() == [4, 6]


def test_tables_are_looked_up_together_for_any_shape_of_timesteps():
    tables = [read_only(np.linspace(0, 1, 11)), read_only(np.linspace(5, 6, 11))]
    x = torch.zeros(2, 3, 4, 4)
    first, second = look_up(torch.tensor([2, 10]), x, *tables)
    assert first.shape == second.shape == (2, 1, 1, 1)
    assert (first.flatten().tolist(), second.flatten().tolist()) == (
        pytest.approx([0.2, 1]),
        pytest.approx([5.2, 6]),
    )
    (one,) = look_up(torch.tensor(2), x, tables[0])
    assert torch.equal(one.expand(2, 1, 1, 1)[0], first[0])


def test_a_table_that_was_unlocked_and_changed_is_read_anew():
    table = read_only(np.zeros(4))
    t, x = torch.tensor([1]), torch.zeros(1, 1)
    assert look_up(t, x, table)[0].item() == 0
    table.flags.writeable = True
    table[1] = 7
    assert look_up(t, x, table)[0].item() == 7
