// A slider selects the slice of its viewer; the two check boxes show or hide all contours.
for (const slider of document.querySelectorAll("input[data-viewer]")) {
  const viewer = document.getElementById(slider.dataset.viewer);
  const output = document.getElementById(slider.dataset.output);
  slider.addEventListener("input", () => {
    const slice = document.getElementById(`${slider.dataset.viewer}-${slider.value}`);
    viewer.querySelector("use").setAttribute("href", `#${slice.id}`);
    viewer.setAttribute("aria-label", `${viewer.dataset.case}, ${slice.dataset.label}`);
    output.textContent = slice.dataset.label;
    slider.setAttribute("aria-valuetext", slice.dataset.label);
  });
}
for (const box of document.querySelectorAll("input[data-hides]")) {
  box.addEventListener("change", () => {
    document.documentElement.classList.toggle(box.dataset.hides, !box.checked);
  });
}
