"""A sink that keeps everything, and a disk that keeps up."""


def saved_at_once(state):
    """Wait for what is being saved; the next save is not skipped."""
    if state is not None:
        state.wait()
        state._rested = 0.0


class Recorder:
    """Keeps what the engine pushes, and in which order."""

    def __init__(self, boundaries, mlp_layers=()):
        self.boundaries, self.mlp_layers = boundaries, mlp_layers
        self.streams, self.mlp = {}, {}
        self.order = []

    def take_mlp(self, layer, window, input_TF, product_TC):
        self.mlp[layer, window] = (input_TF.clone(), product_TC.clone())

    def __call__(self, boundary, window, stream_TC):
        assert (boundary, window) not in self.streams, "a window came twice"
        self.streams[boundary, window] = stream_TC.clone()
        self.order.append((boundary, window))
