"""Prediction for what one machine cannot hold: images in parts, each predicted by some worker of a Ray cluster into a file of its own."""
