"""Makes an engine's optimization profiles: for each input its smallest, most common and largest shape. No TensorRT.

`deploy.passes.engine` converts a user's images, pixels and tokens to a component's axes; `engine_worker` hands the
profiles to the builder, which may refuse them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from runtimes.bundle.tensors import Axis, ShapeRange, TensorSpec
from runtimes.errors import InputError

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]  # input -> its smallest, most common and largest shape
Sizes = Mapping[str, ShapeRange]  # axis -> range


def make_profiles(inputs: Sequence[TensorSpec], axes: Mapping[str, Axis], wanted: Sequence[Sizes] = (), *,
                  static: bool = False, where: str = "") -> tuple[Profile, ...]:
    """Optimization profiles of a component.

    Args:
        inputs, axes: of the component.
        wanted: ranges per profile in units of the axes; an axis left out keeps the component's range. None: one
            profile over the component's ranges.
        static: narrow every axis to its most common size.
        where: name for error messages.

    Raises:
        InputError: an unknown axis, or a range outside the component's limits or off its multiples.
    """
    profiles: list[Profile] = []
    for sizes in wanted or ({},):
        _check_profile(axes, sizes, where)
        ranges = {name: sizes.get(name, axis.range) for name, axis in axes.items()}
        if static:
            ranges = {name: ShapeRange(r.opt, r.opt, r.opt) for name, r in ranges.items()}
        low, common, high = ({n: getattr(r, k) for n, r in ranges.items()} for k in ("min", "opt", "max"))
        profile = {s.name: (s.resolve(low), s.resolve(common), s.resolve(high)) for s in inputs}
        if profile not in profiles:
            profiles.append(profile)
    return tuple(profiles)


def _check_profile(axes: Mapping[str, Axis], sizes: Sizes, where: str) -> None:
    if unknown := sorted(set(sizes) - set(axes)):
        raise InputError(f"no axis {', '.join(unknown)}", where=where, fix=f"axes: {', '.join(axes) or 'none'}")
    for name, wanted in sizes.items():
        axis = axes[name]
        limits = axis.range
        outside = wanted.min < limits.min or wanted.max > limits.max
        if outside or any(getattr(wanted, k) % axis.multiple for k in ("min", "opt", "max")):
            of = f", multiples of {axis.multiple}" if axis.multiple > 1 else ""
            raise InputError(f"profile {name}={wanted.min}:{wanted.opt}:{wanted.max} is outside the model's limits "
                             f"{limits.min} to {limits.max}{of}", where=where,
                             fix="narrow the profile, or widen --shapes of the whole build")
