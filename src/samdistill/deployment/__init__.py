"""Export of models to files for devices. `samdistill.export` is the function."""
