"""Transport by broadcast: all weights, one flat tensor for each bucket, to the workers of all servers at once."""

from __future__ import annotations

import torch

from megatron_vespo.rollout.protocol import TensorList
from megatron_vespo.weight_sync.transport import NamedTensors, StreamTransport


class BroadcastTransport(StreamTransport):
    """Broadcasts each bucket as SGLang's ``flattened_bucket``.

    Args:
        servers: Who gets it.
    """

    def send(self, tensors: NamedTensors) -> None:
        """Broadcast one bucket while the servers receive it."""
        # Widest dtype first: the server wants each tensor at a multiple of its item size.
        ordered = sorted(tensors, key=lambda item: -item[1].dtype.itemsize)
        described = TensorList(
            names=[name for name, _ in ordered],
            dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in ordered],
            shapes=[list(tensor.shape) for _, tensor in ordered],
        )
        flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for _, tensor in ordered])
        name, version = self._servers.group_name, self._version
        self._servers.broadcast(
            flat,
            lambda control: control.update_weights_from_distributed(
                described, name, version, load_format="flattened_bucket"
            ),
        )
        self.sent.bytes += flat.numel()
