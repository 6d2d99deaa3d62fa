"""What is done before and after training: each verb a public function and a command."""
