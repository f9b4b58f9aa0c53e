"""Fit gates: in one sweep over the inputs, by gradient descent, or for an added expert.

calibrate       fit all gates in one sweep, layer by layer
layerwise       run a model one decoder layer at a time
lda             linear discriminant analysis: the closed form of a gate
logistic        logistic regression: the closed form, refined on the tokens themselves
covariance      class means and covariance, from sums over tokens
statistics      means and covariance as a file, so that experts can be added later
sequences       examples as tokens with labels, and how much each token counts
background      texts without a task, with which `prompt` routers compare a prompt
add_expert      add an expert to fitted gates, or drop one
joint           train the gates by gradient descent, as the paper does
losses          the paper's loss and its gradient
training_state  the files from which a stopped training or sweep continues
"""
