"""Cases: calls to try a backend on, named or generated, always the same for the same id.

The rule of this room: a case is words and numbers, and nothing here runs one or judges it.
"""

from rau.testing.cases.case import Case, CaseCall
from rau.testing.cases.catalogue import named
from rau.testing.cases.space import generated

__all__ = ["Case", "CaseCall", "generated", "named"]
