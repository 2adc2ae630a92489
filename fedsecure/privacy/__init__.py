"""What a run may learn about one unit: events and ε, noise, plans, the budget ledger, the site's policy, reports."""
