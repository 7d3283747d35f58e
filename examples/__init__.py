"""What diffax does not need itself: data, evaluation classifiers and studies that use it as anybody would."""
