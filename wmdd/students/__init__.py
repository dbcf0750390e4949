"""Stage 3: students are trained on distilled images and measured on real ones."""
