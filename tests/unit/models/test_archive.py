import io

import pytest
import torch

from megatron_vespo.models.archive import Archives


def saved(tensor: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.getvalue()


TENSORS = {
    "float32": torch.randn(3, 5),
    "bfloat16": torch.randn(2, 1, 7).bfloat16(),
    "float64": torch.randn(4).double(),
    "int64": torch.arange(6).view(2, 3),
    "a scalar": torch.tensor(2.5),
    "nothing": torch.zeros(0, 3),
    "rows of a larger one": torch.randn(8, 4)[2:5],
    "transposed": torch.randn(3, 5).t(),
    "square and transposed": torch.randn(4, 4).t(),
}


@pytest.mark.parametrize("name", TENSORS)
def test_torch_and_we_read_what_either_wrote(name: str) -> None:
    tensor, archives = TENSORS[name], Archives()
    for _ in range(2):  # the second time from what is known
        stream = io.BytesIO()
        archives.save(tensor, stream)
        theirs = torch.load(io.BytesIO(stream.getvalue()), weights_only=True)
        assert theirs.dtype == tensor.dtype and torch.equal(theirs, tensor)
        for archive in (stream.getvalue(), saved(tensor)):
            ours = archives.load(archive, tensor.shape, tensor.dtype)
            assert ours.dtype == tensor.dtype and torch.equal(ours, tensor)


def test_the_bytes_are_torchs() -> None:
    stream = io.BytesIO()
    Archives().save(TENSORS["float32"], stream)
    assert stream.getvalue() == saved(TENSORS["float32"])


def test_an_archive_of_something_else_is_read_as_what_it_is() -> None:
    other = Archives().load(saved(TENSORS["float32"]), torch.Size([5, 3]), torch.float32)
    assert other.shape == (3, 5)


def test_a_cut_archive_is_an_error() -> None:
    with pytest.raises(RuntimeError):
        Archives().load(saved(TENSORS["float32"])[:100], torch.Size([3, 5]), torch.float32)
