"""What an examination prints while it goes on."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch.distributed as dist

from . import dist_util, liveness
from .errors import Diverged, UserError


class Report:
    """Prints a line for each thing that was tried, on the first process; names what failed."""

    def __init__(self) -> None:
        self.topic = ""
        self._out = sys.stdout  # whatever else is done to it

    def begin(self, topic: str) -> None:
        """Name what is tried next."""
        self.topic = topic
        liveness.doing(f"trying: {topic}", starting=True)

    def say(self, text: str) -> None:
        """A line about what was tried."""
        self.write(f"{self.topic}: {text}")

    def warn(self, text: str) -> None:
        """A line about what may not go well."""
        self.write(f"WARNING: {self.topic}: {text}")

    def write(self, line: str) -> None:
        """A line as it is."""
        if dist_util.get_rank() == 0:
            self._out.write(f"{line}\n")
            self._out.flush()

    @contextlib.contextmanager
    def naming_failures(self) -> Iterator[None]:
        """Inside a ``with`` block, errors that a user can mend begin with what was tried.

        :raises ValueError: in place of such errors.
        """
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.topic}: {error}") from None
        except OSError as error:
            if error.filename is None:
                raise
            raise UserError(f"{self.topic}: {error}") from None
        except Diverged:
            raise UserError(
                f"{self.topic}: losses or gradients are not finite in any step: lower --lr"
            ) from None
        except dist.DistBackendError as error:
            raise UserError(f"{self.topic}: {str(error).splitlines()[0]}") from None
