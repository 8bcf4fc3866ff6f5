"""Plans the shapes that are compared: per component the common one, the smallest, and one that nothing was traced at.

Sizes are planned for the pipeline first (images, latent rows, latent columns), because the inputs of all components
are recorded from the same run; each component then gets its own batch and sequence out of its own ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from runtimes.bundle.manifest import Component
from runtimes.bundle.roles import Role, Roles
from runtimes.bundle.tensors import Axis, ShapeRange, TensorSpec
from runtimes.codec.safety_checker import CLIP_INPUT
from runtimes.errors import InputError

Possible = Callable[[str, Mapping[str, int]], bool]
SHAPES = 3  # that every component is compared at, where its axes leave a choice
MAX_RUNS = 6


@dataclass(frozen=True)
class Run:
    """One run of the reference pipeline that inputs are recorded from.

    Attributes:
        images: images generated at once.
        height, width: pixels.
        guided: whether both guidance branches run, which doubles the batch of the denoising network.
        sizes: component -> axis -> size that the recorded inputs are fitted to.
        once: one denoising step will do.
    """

    images: int
    height: int
    width: int
    guided: bool
    sizes: Mapping[str, Mapping[str, int]]
    once: bool = False


def spatial_spec(component: Component) -> TensorSpec | None:
    """The input that is an image or latents, (B, C, H, W), of the pipeline's own size; a text encoder has none."""
    return next((spec for spec in component.inputs if len(spec.shape) == 4 and spec.name != CLIP_INPUT), None)


def range_of(component: Component, dimension: int | str) -> tuple[ShapeRange, int]:
    """Allowed sizes of one dimension and the number they are multiples of."""
    if isinstance(dimension, int):
        return ShapeRange(dimension, dimension, dimension), 1
    axis = component.axes.get(dimension)
    if axis is None:
        raise InputError(f"axis {dimension!r} has no range", where="manifest.json", fix="build the bundle again")
    return axis.range, axis.multiple


def batch_range(component: Component) -> ShapeRange:
    """Allowed sizes of the first dimension of the first input."""
    return range_of(component, component.inputs[0].shape[0])[0]


def always(name: str, sizes: Mapping[str, int]) -> bool:
    """Answers that every component runs at every size."""
    return True


def plan_runs(components: Mapping[str, Component], roles: Roles, *,
              small: bool = False, possible: Possible = always) -> tuple[Run, ...]:
    """Runs that give every component at least three distinct shapes, as far as its axes leave a choice.

    The first is the most common size, the second the smallest, the others not square, with an odd batch, and of sizes
    that are none of min, opt and max. The largest sizes are left out: their reference may take hours.

    Args:
        components: of the candidate: its ranges are the promise that is checked.
        roles: of the pipeline; guidance doubles the denoiser's batch.
        small: for networks that take minutes a call: the most common size once, with the smallest batch, since
            activations are largest there (an unfused attention holds batch x heads x 4096 x 4096 scores); the most
            common batch at the smallest size; the others next to the smallest.
        possible: whether the source model runs a component at some sizes. Where it does not, there is nothing to
            compare with: the batch grows first, then height and width.

    Raises:
        InputError: the components' ranges have no latent size in common.
    """
    rows, columns = (replace(_latent_sizes(components, roles, dimension), small=small) for dimension in (2, 3))
    runs: list[Run] = []
    for number in range(MAX_RUNS):
        height = rows.pick(number)
        start = height, columns.pick(number, avoid=height)
        candidates = (start, *zip(rows.above(start[0]), columns.above(start[1]), strict=False))
        found = (_possible_run(components, number, spatial, roles, small, possible) for spatial in candidates)
        run = next((run for run in found if run is not None), None)
        if run is None:  # the reference will say what PyTorch refuses
            sizes = {name: _sizes(c, name, number, start, roles, small) for name, c in components.items()}
            run = _run(components, sizes, start, roles)
        if all(other.sizes != run.sizes for other in runs):
            runs.append(replace(run, once=small and number == 0))
        if all(len({tuple(run.sizes[name].items()) for run in runs}) >= SHAPES for name in components):
            break
    return tuple(runs)


@dataclass(frozen=True)
class _Choice:
    """Sizes that an axis may have, ascending, and the most common one; `small` prefers those next to the smallest."""

    allowed: tuple[int, ...]
    opt: int
    small: bool = False

    def pick(self, number: int, *, avoid: int = 0, odd: bool = False) -> int:
        """The size for the run of that number: opt, min, then sizes that are neither nor max, nearest to opt first.

        Args:
            number: of the run.
            avoid: a size to take only if there is no other (the other side of an image).
            odd: prefer odd sizes.
        """
        if number == 0:
            return self.opt
        smallest, largest = self.allowed[0], self.allowed[-1]
        if number == 1:
            return smallest

        def rank(size: int) -> tuple[bool, bool, bool, bool]:
            return size == avoid, size in (smallest, self.opt), odd and size % 2 == 0, size == largest

        middle = smallest if self.small else self.opt
        ordered = sorted(self.allowed, key=lambda size: (rank(size), abs(size - middle)))
        best = [size for size in ordered if rank(size) == rank(ordered[0])]
        return best[(number - 2) % len(best)]

    def above(self, size: int) -> tuple[int, ...]:
        """The larger sizes, ascending."""
        return tuple(a for a in self.allowed if a > size)

    def half(self, size: int) -> int:
        """The largest that is at most half of `size`, or the smallest."""
        return max((a for a in self.allowed if 2 * a <= size), default=self.allowed[0])


def halved_sizes(components: Mapping[str, Component], roles: Roles) -> list[tuple[int, int]]:
    """Latent rows and columns of the most common image, then of ever smaller ones, each about half as high and wide.

    Raises:
        InputError: the components' ranges have no latent size in common.
    """
    rows, columns = (_latent_sizes(components, roles, dimension) for dimension in (2, 3))
    sizes = [(rows.opt, columns.opt)]
    while (smaller := (rows.half(sizes[-1][0]), columns.half(sizes[-1][1]))) != sizes[-1]:
        sizes.append(smaller)
    return sizes


def _choice(span: ShapeRange, multiple: int) -> _Choice:
    allowed = tuple(size for size in range(span.min, span.max + 1) if size % multiple == 0)
    if not allowed:
        raise InputError(f"no multiple of {multiple} lies between {span.min} and {span.max}", where="shapes")
    return _Choice(allowed, min(allowed, key=lambda size: abs(size - span.opt)))


def _unit(name: str, roles: Roles) -> int:
    """Size along a spatial axis of a component per latent row or column."""
    return roles.codec.factor if roles.role(name) is Role.IMAGE_ENCODER else 1


def _latent_sizes(components: Mapping[str, Component], roles: Roles, dimension: int) -> _Choice:
    """Latent rows (dimension 2) or columns (3) that every component takes."""
    common = (roles.codec.height if dimension == 2 else roles.codec.width) // roles.codec.factor
    allowed: set[int] | None = None
    for name, component in components.items():
        spec = spatial_spec(component)
        if spec is None:
            continue
        span, multiple = range_of(component, spec.shape[dimension])
        unit = _unit(name, roles)
        common = span.opt // unit
        sizes = {s // unit for s in range(span.min, span.max + 1) if s % unit == 0 and s % multiple == 0}
        allowed = sizes if allowed is None else allowed & sizes
    if allowed is None:
        return _Choice((common,), common)
    if not allowed:
        raise InputError("the components' ranges have no latent size in common", where="shapes",
                         fix="give height and width ranges that are multiples of the VAE factor")
    ordered = tuple(sorted(allowed))
    return _Choice(ordered, min(ordered, key=lambda size: abs(size - common)))


def _sizes(
    component: Component, name: str, number: int, spatial: tuple[int, int], roles: Roles, small: bool
) -> dict[str, int]:
    spec = spatial_spec(component)
    fixed = dict(zip(spec.shape[2:], spatial, strict=True)) if spec is not None else {}
    batch = component.inputs[0].shape[0]
    sizes = {}
    for axis_name in _axes_of(component):
        if axis_name in fixed:
            sizes[axis_name] = fixed[axis_name] * _unit(name, roles)
            continue
        axis: Axis = component.axes[axis_name]
        turn = {0: 1, 1: 0}.get(number, number) if small and axis_name == batch else number
        sizes[axis_name] = _choice(axis.range, axis.multiple).pick(turn, odd=axis_name == batch)
    return sizes


def _possible_run(
    components: Mapping[str, Component], number: int, spatial: tuple[int, int], roles: Roles, small: bool,
    possible: Possible,
) -> Run | None:
    """A run at these latents, none of whose calls the source refuses: those that are recorded and those compared."""
    sizes = {}
    for name, component in components.items():
        wanted = _sizes(component, name, number, spatial, roles, small)
        fitting = next((s for s in _with_larger_batches(component, wanted) if possible(name, s)), None)
        if fitting is None:
            return None
        sizes[name] = fitting
    run = _run(components, sizes, spatial, roles)
    for name, component in components.items():
        batch = component.inputs[0].shape[0]
        rows = run.images * (2 if roles.role(name) is Role.DENOISER and run.guided else 1)
        if isinstance(batch, str) and not possible(name, {**sizes[name], batch: rows}):
            return None
    return run


def _with_larger_batches(component: Component, sizes: Mapping[str, int]) -> Iterator[dict[str, int]]:
    yield dict(sizes)
    batch = component.inputs[0].shape[0]
    if isinstance(batch, str) and spatial_spec(component) is not None:
        for rows in _choice(component.axes[batch].range, component.axes[batch].multiple).above(sizes[batch]):
            yield {**sizes, batch: rows}


def _axes_of(component: Component) -> list[str]:
    names = [d for spec in component.inputs for d in spec.shape if isinstance(d, str)]
    for name in dict.fromkeys(names):
        range_of(component, name)
    return list(dict.fromkeys(names))


def _run(
    components: Mapping[str, Component], sizes: Mapping[str, Mapping[str, int]], spatial: tuple[int, int],
    roles: Roles,
) -> Run:
    """As few images as fill every component's batch; rows are repeated where guidance cannot double the batch."""
    denoiser = components.get(roles.denoiser.component)
    guided = denoiser is not None and batch_range(denoiser).max >= 2
    wanted = 1
    for name, component in components.items():
        batch = component.inputs[0].shape[0]
        size = sizes[name].get(batch, 1) if isinstance(batch, str) else batch
        if spatial_spec(component) is not None:  # prompts and rows of other calls make up a text encoder's batch
            wanted = max(wanted, -(-size // 2) if roles.role(name) is Role.DENOISER and guided else size)
    images = min(wanted, images_at_once(components, roles))
    factor = roles.codec.factor
    return Run(images, spatial[0] * factor, spatial[1] * factor, guided, sizes)


def images_at_once(components: Mapping[str, Component], roles: Roles, wanted: int = 8) -> int:
    """How many images the components take in one batch, with guidance, up to `wanted`."""
    limits = [wanted]
    for name, component in components.items():
        largest = batch_range(component).max
        limits.append(max(1, largest // 2) if roles.role(name) is Role.DENOISER else largest)
    return min(limits)
