"""Entry point of ``python -m samdistill``."""

from .cli import main

raise SystemExit(main())
