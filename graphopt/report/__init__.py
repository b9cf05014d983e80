"""What a compile tells: records, report.json, the page, and inspections of models."""
