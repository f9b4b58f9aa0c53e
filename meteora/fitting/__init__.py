"""How gates are made: in closed form, by gradient descent, and for one expert more.

calibrate       fit all gates in one sweep, layer by layer
layerwise       run a model one decoder layer at a time
lda             linear discriminant analysis: the closed form of a gate
covariance      class means and covariance, added up token by token
statistics      those sums as a file, so that experts can join later
sequences       examples as tokens with labels, and what each token counts
add_expert      one expert more or less in fitted gates
joint           train the gates by gradient descent, as the paper does
losses          the paper's loss and its gradient
learning_rate   warm-up and cosine
training_state  what a stopped training needs to go on
"""
