// Sliders choose the slice that a viewer shows; the two boxes hide or show all contours.
for (const slider of document.querySelectorAll("input[data-viewer]")) {
  const viewer = document.getElementById(slider.dataset.viewer);
  const words = document.getElementById(slider.dataset.words);
  slider.addEventListener("input", () => {
    const slice = document.getElementById(`${slider.dataset.viewer}-${slider.value}`);
    viewer.querySelector("use").setAttribute("href", `#${slice.id}`);
    viewer.setAttribute("aria-label", `${viewer.dataset.case}, ${slice.dataset.label}`);
    words.textContent = slice.dataset.label;
    slider.setAttribute("aria-valuetext", slice.dataset.label);
  });
}
for (const box of document.querySelectorAll("input[data-hides]")) {
  box.addEventListener("change", () => {
    document.documentElement.classList.toggle(box.dataset.hides, !box.checked);
  });
}
