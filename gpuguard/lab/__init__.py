"""The lab: real programs in namespaces of their own, for the demonstration, labelled captures and evaluation."""
