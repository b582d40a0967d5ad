"""What a person looks at after a run: ``write`` makes one run's page, ``compare`` sets runs side by side."""

from fedsim.report.groups import Row, compare
from fedsim.report.single import write

__all__ = ["Row", "compare", "write"]
