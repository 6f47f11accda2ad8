"""People look at what a run made: a local page, and labels that go into the export."""
