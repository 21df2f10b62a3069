"use strict";
for (const block of document.querySelectorAll("[data-pictures]")) {
  const pictures = JSON.parse(document.getElementById(block.dataset.pictures).textContent);
  const [clip, left, right] = ["clip", "left", "right"].map((name) => block.querySelector(`select[name=${name}]`));
  const compare = block.querySelector(".compare");
  const divider = compare.querySelector("input");
  const says = block.querySelector(".says");

  const fill = (select, names, chosen) => {
    select.replaceChildren(...names.map((name) => new Option(name, name)));
    if (names.includes(chosen)) select.value = chosen;
  };
  const show = (image, name) => {
    image.src = pictures[clip.value][name];
    image.alt = `${name}, clip ${clip.value}`;
  };
  const move = () => {
    compare.style.setProperty("--at", `${divider.value}%`);
    divider.setAttribute("aria-valuetext", `${divider.value} percent ${left.value}, the rest ${right.value}`);
  };
  const compareThem = () => {
    show(compare.querySelector(".left"), left.value);
    show(compare.querySelector(".right"), right.value);
    says.textContent = `Left of the divider: ${left.value}. Right: ${right.value}.`;
    move();
  };
  const changeClip = () => {
    const names = Object.keys(pictures[clip.value]);
    const results = names.filter((name) => name.startsWith("#"));
    fill(left, names, left.value || names.find((name) => name.startsWith("backbone")) || names[0]);
    fill(right, names, right.value || results[results.length - 1] || names[names.length - 1]);
    block.querySelector(".strip").replaceChildren(...names.map((name) => {
      const figure = document.createElement("figure");
      const image = document.createElement("img");
      const caption = document.createElement("figcaption");
      show(image, name);
      caption.textContent = name;
      figure.append(image, caption);
      return figure;
    }));
    compareThem();
  };

  fill(clip, Object.keys(pictures));
  clip.addEventListener("change", changeClip);
  left.addEventListener("change", compareThem);
  right.addEventListener("change", compareThem);
  divider.addEventListener("input", move);
  changeClip();
}
