"""The method, pure: exit information, fitted heads, the rule that chooses an exit, baselines."""
