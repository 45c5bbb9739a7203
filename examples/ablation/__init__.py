"""The paper's ablations on the small preset: variants, how each is judged, tables and plots."""
