"""Write docs/gallery.md, docs/quality_checks.md and their pictures: make gallery."""

from scripts.gallery.pages import write_gallery

if __name__ == "__main__":
    print(f"wrote {write_gallery()} pictures")
