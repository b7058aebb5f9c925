"""The paper: the numbers it prints, its claims, our verdicts on them, and an audit of its arithmetic."""

from replicate.paper.printed import data, model, number, rows
from replicate.paper.table import check, claim_table, claims, claims_markdown, show

__all__ = ["check", "claim_table", "claims", "claims_markdown", "data", "model", "number", "rows", "show"]
