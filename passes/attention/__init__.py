"""Where the attentions are: QKᵀ -> softmax -> V, by dataflow. Analyses; no graph is changed."""
