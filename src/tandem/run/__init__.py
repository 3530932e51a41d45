"""What a run leaves behind, and what it shows while it goes."""

from tandem.run.folder import RunFolder
from tandem.run.progress import Progress

__all__ = ["Progress", "RunFolder"]
