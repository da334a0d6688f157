"""Launches that cost the host what the driver costs."""

from typing import Any


class Launch:
    """A kernel with its compile-time arguments, compiled at the first call, for calls that differ in nothing else.

    Triton's own launcher looks at every argument of every call, to see which variant of the kernel it wants: 28 us of
    Python for a product, where this takes 4. That later calls want the variant of the first is the caller's duty: the
    same device, the same dtypes, pointers to multiples of 16 bytes, and numbers that differ named in the kernel's
    `do_not_specialize`.
    """

    __slots__ = ("_compiled", "_last", "constants", "kernel", "options")

    def __init__(self, kernel: Any, constants: dict[str, Any], **options: int | bool) -> None:
        """kernel: a `triton.jit` function whose last parameters are those of `constants`; options: the compiler's."""
        self.kernel, self.constants, self.options = kernel, constants, options
        self._compiled: Any = None
        self._last: tuple[Any, ...] = ()

    def __call__(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        """Launches on the current device and stream.

        Raises:
            OutOfResources: At the first call: the device has less shared memory than the kernel wants.
        """
        if self._compiled is None:  # for ever so in Triton's interpreter
            self._compiled = self.kernel[grid](*arguments, **self.constants, **self.options)
            if self._compiled is not None:
                names = self.kernel.arg_names[len(arguments) :]
                self._last = tuple(self.constants[name] for name in names)
        else:
            self._compiled[grid](*arguments, *self._last)
