"""Studies of what retrieved exits give and cost: `raee-serve eval suite`."""
