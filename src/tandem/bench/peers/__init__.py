"""Other systems on the same work, each as a script for the Python that it is installed in: none imports tandem."""
