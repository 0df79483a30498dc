"""What a KV cache is made of, and which of its arrays lie in the host's memory."""

from __future__ import annotations

from typing import Final, NamedTuple

# A key of the first layer follows from its token alone. A text repeats its tokens, so that hundreds of keys are equal
# to a winner there, and a sketch cannot tell them apart.
FIRST_SKETCHED_LAYER: Final = 1


class Placement(NamedTuple):
    """What a cache is made of, and how much of it is far: in the host's memory, which kernels reach by its address.

    Attributes:
        sketched: layers from FIRST_SKETCHED_LAYER on have sketches for decode steps to read.
        far_values: so many layers have their values far, the last ones.
        far_keys: so many have their keys far, of those with a sketch, at even distances, so that a prompt's step can
            bring the keys of one while it attends in those between.
        near_size: newest tokens of what is far that the device holds as well; see minirea.kernels.near.
    """

    sketched: bool = False
    far_values: int = 0
    far_keys: int = 0
    near_size: int = 0

    @property
    def far_arrays(self) -> int:
        """Layers' keys and layers' values that are far, together."""
        return self.far_values + self.far_keys

    def values_are_far(self, layer: int, num_layers: int) -> bool:
        return layer >= num_layers - self.far_values

    def keys_are_far(self, layer: int, num_layers: int) -> bool:
        return layer in self.layers_of_far_keys(num_layers)

    def layers_of_far_keys(self, num_layers: int) -> list[int]:
        first = FIRST_SKETCHED_LAYER
        return [first + index * (num_layers - first) // self.far_keys for index in range(self.far_keys)]


NEAR: Final = Placement()  # all of it on the device, without sketches


def placements(
    num_layers: int, cache: str, sketches: list[bool], far_sketches: list[bool], near: int
) -> list[Placement]:
    """What a cache may be, best first.

    All on the device before anything else; then values on the host, of as few layers as need be, and then keys, whose
    layers a decode step searches by their sketches.

    Args:
        cache: one of config.CACHES; "host" has the values of all layers there.
        sketches: whether to have sketches, the preferred answer first.
        far_sketches: the same where sketches move values to the host, which would have their room otherwise.
        near: Placement.near_size of those with anything far; 0 if nothing can be.
    """
    on_device = [Placement(sketched) for sketched in sketches]
    if cache == "device" or not near:
        return on_device
    least = num_layers if cache == "host" else 1
    far = []
    for sketched in sketches if cache == "host" else far_sketches:
        far += [Placement(sketched, count, 0, near) for count in range(least, num_layers + 1)]
        keys = range(1, num_layers - FIRST_SKETCHED_LAYER + 1) if sketched else ()
        far += [Placement(True, num_layers, count, near) for count in keys]
    return far if cache == "host" else on_device + far
