"""What a store's rows say: statistics, tables, figures, one page."""
